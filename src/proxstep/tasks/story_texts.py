"""The stories of the word problems: a text with numbers to fill in, and how it is solved.

Each line is TEXT | STEPS. Numbers are {x}, {y}, {z} and {w}, names {A} and {B}; in a step, r is
the result of the one before. No story of `HELD_OUT_STORIES` is told in `TRAIN_STORIES`.
"""

TRAIN_STORIES = """
{A} has {x} apples. {B} gives {A} {y} more, and {A} eats {z}. How many are left? | x + y; r - z
A bus carries {x} people. {y} get off and {z} get on. How many are on it now? | x - y; r + z
{A} buys {x} boxes of {y} pencils and finds {z} more. How many has {A}? | x * y; r + z
{x} cookies are shared by {y} children. {A} eats {z} of his. How many has he left? | x / y; r - z
{A} read {x} pages on Monday, {y} on Tuesday and {z} on Friday. How many is that? | x + y; r + z
Of {x} books on a shelf {A} takes {y} and {B} takes {z}. How many stay there? | x - y; r - z
A ticket costs {x} dollars. {A} buys {y} and a map for {z}. What does {A} pay? | x * y; r + z
{A} cuts {x} meters of rope into {y} equal parts. How long are {z} of them? | x / y; r * z
{A} is {x} years old, {B} is {y} years older. How old is {B} in {z} years? | x + y; r + z
{A} scored {x} points, {B} {y} fewer. How many did {B} have after {z} more? | x - y; r + z
A farmer plants {x} rows of {y} trees. {z} of them die. How many trees live? | x * y; r - z
{x} eggs are packed in cartons of {y}. {z} cartons are sold. How many cartons stay? | x / y; r - z
{x} red and {y} blue balloons hang in a room. {z} of them burst. How many hang there? | x + y; r - z
{A} needs {x} stamps, has {y} and gets {z}. How many stamps are missing? | x - y; r - z
{A} runs {x} kilometers a day for {y} days, then {z} more. How many is that? | x * y; r + z
{A} earns {x} dollars in {y} hours. How many dollars are that in {z} hours? | x / y; r * z
The morning was {x} degrees. It got {y} warmer, then {z} colder. How warm was it? | x + y; r - z
A jar held {x} candies. {A} ate {y} and put {z} in. How many candies are in it? | x - y; r + z
Each of {x} wagons has {y} wheels. {z} wheels break. How many wheels are whole? | x * y; r - z
{A} puts {x} photos on {y} pages evenly. How many are on {z} pages? | x / y; r * z
{A} has {x} marbles, finds {y} and then loses {z}. How many marbles are left? | x + y; r - z
{A} buys {x} bags of {y} oranges and eats {z}. How many oranges are left? | x * y; r - z
{A} had {x} dollars, spent {y} and then earned {z}. How many has {A} now? | x - y; r + z
{x} boys and {y} girls form teams of {z}. How many teams are there? | x + y; r / z
{A} had {x} nuts and ate {y}. {z} friends shared the rest. How many got each? | x - y; r / z
A pen costs {x} dollars and a ruler {y}. What do {z} of both cost in dollars? | x + y; r * z
{A} has {x} dolls, {B} has {y} times as many. How many do both have together? | x * y; r + x
A baker bakes {x} trays of {y} rolls and {z} more. How many rolls is that? | x * y; r + z
{x} dollars are shared by {y} workers. {A} spends {z} of his. What is left of it? | x / y; r - z
{A} saves {x} dollars a week for {y} weeks. A ball costs {z}. What is left? | x * y; r - z
{x} of {y} seats in a row are free, in each of {z} rows. How many are taken? | y - x; r * z
{A} picks {x} roses and {y} tulips and gives away {z}. How many are left? | x + y; r - z
{A} puts {x} coins in {y} equal piles and adds {z} to one. How many are in it? | x / y; r + z
A room has {x} rows of {y} chairs. {z} more are brought. How many is that? | x * y; r + z
{A} has {x} shirts. {y} are white, {z} green, the rest is black. How many? | x - y; r - z
A tank holds {x} liters. {A} pours in {y}, then {z}. How many are in it? | x + y; r + z
{A} walks {x} miles there and {y} back, on {z} days. How many miles is that? | x + y; r * z
{A} makes {x} cards and {B} {y}. They pack them in {z}s. How many packs? | x + y; r / z
Of {x} plates {y} broke. The others stand in stacks of {z}. How many stacks? | x - y; r / z
{A} was {x} years old when {B} was born. {B} is {y}. How old is {A} in {z} years? | x + y; r + z
{A} has {x} hens. {y} more come, {z} fly off, {w} are sold. How many? | x + y; r - z; r - w
{A} buys {x} cups at {y} dollars, a pot for {z} and a pan for {w}. The sum? | x * y; r + z; r + w
{A} had {x} songs, deleted {y}, added {z}, and deleted {w}. How many? | x - y; r + z; r - w
{x} girls and {y} boys each bring {z} cakes. {w} are eaten. How many are left? | x + y; r * z; r - w
"""

HELD_OUT_STORIES = """
A lake has {x} ducks on it. {y} more land and {z} leave. How many are on it then? | x + y; r - z
A shop had {x} lamps, sold {y} and got {z} new ones. How many has it then? | x - y; r + z
A spider has {x} legs. {y} spiders and a {z}-legged bug have how many legs? | x * y; r + z
{x} crayons are dealt to {y} tables evenly. One table loses {z}. What has it left? | x / y; r - z
{A} won {x} medals last year, {y} this year, {z} before. How many is that? | x + y; r + z
A tower was {x} meters high. It lost {y}, then {z} in a storm. How high is it? | x - y; r - z
{A} drinks {x} cups of tea daily for {y} days, {B} {z} in all. How many cups is it? | x * y; r + z
{x} kilos of rice fill {y} bags evenly. {A} carries {z} bags. How many kilos is that? | x / y; r * z
{A} drove {x} miles before lunch, {y} after it and {z} at night. How many in all? | x + y; r + z
{A} had {x} emails, deleted {y} and received {z}. How many emails are there? | x - y; r + z
{A} caught {x} fish, {B} caught {y}, and they threw {z} back. How many remain? | x + y; r - z
{x} vans with {y} guests each arrive. {z} guests leave. How many guests remain? | x * y; r - z
A hotel had {x} guests. {y} left and {z} came. How many guests has it now? | x - y; r + z
{A} has {x} dimes and {B} {y}. They make {z} equal heaps. How big is a heap? | x + y; r / z
A cook had {x} potatoes, {y} were bad. He used {z} a day. How many days was that? | x - y; r / z
A soup costs {x} dollars, a salad {y}. {z} people take both. What do they pay? | x + y; r * z
{A} sews {x} buttons on each of {y} coats and has {z} left. How many were there? | x * y; r + z
{x} kittens live in {y} baskets evenly. {z} leave one basket. What is left in it? | x / y; r - z
A pack of {x} batteries lost {y}, later {z}. How many batteries are left? | x - y; r - z
{A} swam {x} laps in May, {y} in June, and a third time {z}. How many laps? | x + y; r + z
A pond had {x} frogs. {y} came, {z} came later and {w} died. How many live? | x + y; r + z; r - w
{x} sheets make {y} books each. {z} books are lost and {w} found. How many? | x * y; r - z; r + w
"""
