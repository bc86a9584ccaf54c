"""The stories of the word problems: a text with numbers to fill in, and how it is solved.

Each line is TEXT | STEPS. Numbers are {x}, {y} and {z}, names {A} and {B}; in a second step, r is
the result of the first. No story of `HELD_OUT_STORIES` is told in `TRAIN_STORIES`, nor any of its
objects.
"""

TRAIN_STORIES = """
{A} has {x} apples. {B} gives {A} {y} more. How many apples does {A} have now? | x + y
A bus carries {x} people. At a stop, {y} of them get off. How many people are left? | x - y
{A} buys {x} boxes of pencils. There are {y} pencils in a box. How many pencils is that? | x * y
{x} cookies are shared equally by {y} children. How many cookies does each child get? | x / y
{A} read {x} pages on Monday and {y} on Tuesday. How many pages did {A} read? | x + y
There are {x} books on a shelf. {A} takes {y} of them. How many books stay there? | x - y
A ticket costs {x} dollars. How many dollars do {y} tickets cost? | x * y
{A} cuts {x} meters of rope into {y} equal parts. How many meters long is each part? | x / y
{A} is {x} years old, and {B} is {y} years older. How old is {B}? | x + y
{A} scored {x} points and {B} scored {y}. How many more points did {A} score? | x - y
A farmer plants {x} rows of trees, {y} in each row. How many trees are there? | x * y
{x} eggs are packed in cartons of {y}. How many cartons are filled? | x / y
{x} red and {y} blue balloons hang in a room. How many balloons hang there? | x + y
{A} needs {x} stamps for an album and has {y}. How many stamps are missing? | x - y
{A} runs {x} kilometers a day. How many kilometers does {A} run in {y} days? | x * y
{A} earns {x} dollars in {y} hours. How many dollars is that in one hour? | x / y
The morning was {x} degrees. By noon it was {y} degrees warmer. How warm was noon? | x + y
A jar held {x} candies before {A} ate {y}. How many candies are still in it? | x - y
Each of {x} wagons has {y} wheels. How many wheels do they have? | x * y
{A} puts {x} photos on {y} pages, the same number on each. How many are on a page? | x / y
{A} has {x} marbles, finds {y} and then loses {z}. How many marbles are left? | x + y; r - z
{A} buys {x} bags of {y} oranges and eats {z} oranges. How many are left? | x * y; r - z
{A} had {x} dollars, spent {y} and then earned {z}. How many dollars has {A} now? | x - y; r + z
{x} boys and {y} girls form teams of {z}. How many teams are there? | x + y; r / z
{A} had {x} nuts and ate {y}. Then {z} friends shared the rest. How many got each? | x - y; r / z
A pen costs {x} dollars and a ruler {y}. What do {z} of both cost in dollars? | x + y; r * z
{A} has {x} dolls, {B} has {y} times as many. How many do both have together? | x * y; r + x
A baker bakes {x} trays of {y} rolls and {z} more rolls. How many rolls is that? | x * y; r + z
{x} dollars are shared by {y} workers. One of them spends {z}. What is left of his? | x / y; r - z
{A} saves {x} dollars a week for {y} weeks. A ball costs {z}. What is left then? | x * y; r - z
A train has {x} seats, and {y} are free. Then {z} more people sit down. How many sit? | x - y; r + z
{A} picks {x} roses and {y} tulips and gives away {z}. How many flowers are left? | x + y; r - z
{A} puts {x} coins in {y} equal piles and adds {z} to one. How many are in that pile? | x / y; r + z
A room has {x} rows of {y} chairs. {z} more are brought. How many chairs are there? | x * y; r + z
{A} has {x} shirts. {y} are white, {z} are green, and the rest is black. How many? | x - y; r - z
A tank holds {x} liters. {A} pours in {y}, then {z}. How many liters are in it? | x + y; r + z
{A} walks {x} miles there and {x} back, on {y} days. How many miles is that? | x + x; r * y
{A} makes {x} cards and {B} {y}. They sell them in packs of {z}. How many packs? | x + y; r / z
Of {x} plates {y} broke. The others stand in stacks of {z}. How many stacks? | x - y; r / z
{A} is {x} years old. {B} was {y} when {A} was born. How old is {B} in {z} years? | x + y; r + z
"""

HELD_OUT_STORIES = """
A lake has {x} ducks on it, and {y} more land. How many ducks are on the lake then? | x + y
A shop had {x} lamps in the morning and sold {y}. How many lamps has it not sold? | x - y
A spider has {x} legs. How many legs do {y} spiders have? | x * y
A teacher deals {x} crayons out to {y} tables evenly. How many does a table get? | x / y
Last year {A} won {x} medals, this year {y}. How many medals has {A} won? | x + y
A tower is {x} meters high, a house {y}. By how many meters is the tower higher? | x - y
{A} drinks {x} cups of tea daily. How many cups does {A} drink in {y} days? | x * y
{A} fills {x} kilos of rice into bags of {y} kilos. How many bags does {A} need? | x / y
{A} drove {x} miles before lunch and {y} after it. How many miles did {A} drive? | x + y
{A} had {x} emails and deleted {y}. How many emails remain? | x - y
{A} caught {x} fish, {B} caught {y}, and they threw {z} back. How many fish remain? | x + y; r - z
{x} vans with {y} guests each arrive. {z} guests leave. How many guests remain? | x * y; r - z
A hotel had {x} guests. {y} left and {z} came. How many guests has it now? | x - y; r + z
{A} has {x} dimes and {B} {y}. They divide all into {z} equal heaps. How big is one? | x + y; r / z
A cook had {x} potatoes, {y} were bad. He used {z} a day. How many days did it take? | x - y; r / z
A soup costs {x} dollars, a salad {y}. {z} people order both. How many dollars is it? | x + y; r * z
{A} sews {x} buttons on each of {y} coats and has {z} left. How many were there? | x * y; r + z
{x} kittens live in {y} baskets evenly. {z} leave one basket. How many remain in it? | x / y; r - z
A pack of {x} batteries lost {y}, later {z} more. How many batteries are left? | x - y; r - z
In May {A} swam {x} laps, in June {y}, in July {z}. How many laps was that? | x + y; r + z
"""
