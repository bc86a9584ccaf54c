# ruff: noqa: E501
"""The stories of the word problems: a text with numbers to fill in, and how it is solved.

Each line is TEXT | STEPS. Numbers are {x}, {y}, {z} and {w}, names {A} and {B}; in a step, r is
the result of the one before. No story of `HELD_OUT_STORIES` is told in `TRAIN_STORIES`.
"""

TRAIN_STORIES = """
{A} buys {x} boxes of {y} pencils and finds {z} more. How many has {A}? | x * y; r + z
{A} read {x} pages on Monday, {y} on Tuesday and {z} on Friday. How many is that? | x + y; r + z
A ticket costs {x} dollars. {A} buys {y} and a map for {z}. What does {A} pay? | x * y; r + z
{A} is {x} years old, {B} is {y} years older. How old is {B} in {z} years? | x + y; r + z
{A} runs {x} kilometers a day for {y} days, then {z} more. How many is that? | x * y; r + z
A pen costs {x} dollars and a ruler {y}. What do {z} of both cost in dollars? | x + y; r * z
{A} has {x} dolls, {B} has {y} times as many. How many do both have together? | x * y; r + x
A baker bakes {x} trays of {y} rolls and {z} more. How many rolls is that? | x * y; r + z
A room has {x} rows of {y} chairs. {z} more are brought. How many is that? | x * y; r + z
A tank holds {x} liters. {A} pours in {y}, then {z}. How many are in it? | x + y; r + z
{A} walks {x} miles there and {y} back, on {z} days. How many miles is that? | x + y; r * z
{A} was {x} years old when {B} was born. {B} is {y}. How old is {A} in {z} years? | x + y; r + z
{A} buys {x} cups at {y} dollars, a pot for {z} and a pan for {w}. The sum? | x * y; r + z; r + w
A farmer plants {x} rows of {y} trees and {z} single trees. How many trees is that? | x * y; r + z
Each of {x} wagons has {y} wheels. The engine has {z}. How many wheels are there? | x * y; r + z
{A} has {x} marbles, finds {y} and wins {z}. How many marbles has {A} now? | x + y; r + z
{A} saves {x} dollars a week for {y} weeks and has {z} already. How much is that? | x * y; r + z
{x} boys and {y} girls each plant {z} seeds. How many seeds are planted? | x + y; r * z
{A} picks {x} roses and {y} tulips for each of {z} vases. How many flowers are picked? | x + y; r * z
A jar held {x} candies. {A} put {y} in, and {B} {z}. How many candies are in it? | x + y; r + z
The morning was {x} degrees. It got {y} warmer, then {z} warmer. How warm was it? | x + y; r + z
{A} packs {x} eggs in each of {y} cartons. {z} eggs stay out. How many eggs are there? | x * y; r + z
{A} scored {x} points, {B} {y} more. How many did {B} have after another {z}? | x + y; r + z
A bus carries {x} people. {y} get on, then {z} more get on. How many are on it now? | x + y; r + z
{A} puts {x} photos on each of {y} pages and {z} on the cover. How many photos is that? | x * y; r + z
A dog eats {x} grams at noon and {y} at night. How many grams does it eat in {z} days? | x + y; r * z
{A} has {x} stamps, {B} has {y} times as many. How many stamps do both have? | x * y; r + x
{A} needs {x} nails for a chair and {y} for a table. How many nails do {z} of both need? | x + y; r * z
A house has {x} floors with {y} windows and a roof with {z}. How many windows has it? | x * y; r + z
{A} writes {x} letters a day for {y} days, {B} writes {z}. How many letters are written? | x * y; r + z
{A} buys {x} red and {y} blue balloons for each of {z} guests. How many balloons are that? | x + y; r * z
{A} cooks {x} pots of {y} liters of soup, and {z} liters more. How many liters is that? | x * y; r + z
A train has {x} cars in front, {y} in the middle and {z} behind. How many cars has it? | x + y; r + z
{A} gets {x} coins from {B}, {y} from an aunt, {z} from an uncle and {w} more. The sum? | x + y; r + z; r + w
{x} shelves hold {y} books each. {A} adds {z} books, then {w}. How many are there? | x * y; r + z; r + w
"""

HELD_OUT_STORIES = """
A spider has {x} legs. {y} spiders and a {z}-legged bug have how many legs? | x * y; r + z
{A} won {x} medals last year, {y} this year, {z} before. How many is that? | x + y; r + z
{A} drinks {x} cups of tea daily for {y} days, {B} {z} in all. How many cups is it? | x * y; r + z
{A} drove {x} miles before lunch, {y} after it and {z} at night. How many in all? | x + y; r + z
A soup costs {x} dollars, a salad {y}. {z} people take both. What do they pay? | x + y; r * z
{A} sews {x} buttons on each of {y} coats and has {z} left. How many were there? | x * y; r + z
{A} swam {x} laps in May, {y} in June, and a third time {z}. How many laps? | x + y; r + z
A lake has {x} ducks on it. {y} swans and {z} geese land. How many birds are on it? | x + y; r + z
{x} vans with {y} guests each arrive, and {z} guests on foot. How many guests came? | x * y; r + z
{A} caught {x} fish in the river, {B} {y}, and both {z} at sea. How many fish is that? | x + y; r + z
A tower was {x} meters high. It grew by {y}, then by {z}. How high is it in meters? | x + y; r + z
A pack holds {x} white and {y} black batteries. How many batteries are in {z} packs? | x + y; r * z
{x} kittens live in each of {y} baskets, and {z} on the sofa. How many kittens live there? | x * y; r + z
A choir sings {x} songs, a band {y} times as many. How many songs do both sing? | x * y; r + x
A song takes {x} minutes, the break {y}. How many minutes are {z} songs with breaks? | x + y; r * z
A hotel had {x} guests. {y} came by car, {z} by train and {w} by ship. How many has it now? | x + y; r + z; r + w
"""
