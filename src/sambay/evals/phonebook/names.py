"""First and last names for books in which no name occurs twice, and the books' random drawing."""

from __future__ import annotations

import random

# Common names of several languages, in ASCII letters; the order is part of every prompt, so a name
# that is added or removed makes another test.
_FIRST = """
Aaron Abigail Adam Adele Adrian Agnes Ahmed Aidan Aisha Alan Albert Alejandro Alexander Alice
Alicia Alison Allison Alma Amanda Amelia Amina Amir Amy Ana Anders Andrea Andrew Angela Anita Anna
Anthony Antonio April Ariel Arjun Arthur Ashley Astrid Audrey Austin Barbara Beatrice Benjamin
Bernard Beth Betty Beverly Bianca Boris Bradley Brandon Brenda Brian Bridget Bruce Bruno Bryan
Caleb Cameron Camila Carl Carla Carlos Carmen Carol Caroline Carolyn Catherine Cecilia Celia
Charles Charlotte Cheryl Chloe Christian Christina Christine Christopher Claire Clara Claudia
Clifford Colin Connor Craig Crystal Curtis Cynthia Daisy Dale Daniel Daniela Darius David Deborah
Dennis Derek Diana Diego Dmitri Dolores Dominic Donald Donna Dora Doris Dorothy Douglas Duncan
Dylan Edgar Edith Eduardo Edward Edwin Eileen Elaine Eleanor Elena Elias Elijah Elizabeth Ella
Ellen Emil Emily Emma Eric Erika Ernest Esther Ethan Eugene Eva Evan Evelyn Fatima Felicia Felix
Fernando Fiona Florence Frances Francis Frank Franz Frederick Gabriel Gabriela Gary Gavin Geoffrey
George Gerald Gina Giovanni Gloria Gordon Grace Graham Gregory Greta Gustav Hana Hannah Harold
Harriet Harry Hassan Hazel Heather Hector Heidi Helen Helena Henry Herbert Hiroshi Holly Howard
Hugh Hugo Ian Ibrahim Ida Igor Ingrid Irene Irina Iris Isaac Isabel Ivan Ivy Jack Jackson Jacob
Jacqueline James Jamie Jan Jane Janet Janice Jason Javier Jay Jean Jeffrey Jennifer Jeremy Jerome
Jesse Jessica Jill Joan Joanna Joel Johanna John Jonathan Jordan Jorge Joseph Joshua Joyce Juan
Judith Judy Julia Julian Julie June Justin Karen Karim Karl Kate Katherine Kathleen Keith Kelly
Kenji Kenneth Kevin Kimberly Kirk Klaus Kristen Kyle Lara Larry Laura Lauren Lawrence Leah Leila
Leo Leon Leonard Leroy Leslie Lewis Liam Lillian Linda Lisa Lloyd Logan Lois Lorraine Louis Louise
Lucas Lucia Lucy Luis Luke Lydia Lynn Mabel Madison Magnus Manuel Marco Marcus Margaret Maria Marie
Marilyn Mario Marion Marjorie Mark Martha Martin Mary Mason Mateo Matthew Maureen Maurice Max Maya
Megan Mei Melanie Melissa Michael Michelle Miguel Mildred Milton Mina Miriam Mohamed Molly Monica
Morgan Nadia Nancy Naomi Natalie Nathan Neil Nicholas Nicole Nina Noah Nora Norman Olga Oliver
Olivia Omar Oscar Owen Pablo Pamela Patricia Patrick Paul Paula Pauline Pedro Peggy Penelope Peter
Philip Phoebe Priya Rachel Rafael Ralph Ramon Randall Raymond Rebecca Regina Rekha Renata Ricardo
Richard Rita Robert Roberta Roger Roland Ronald Rosa Rose Roy Ruby Russell Ruth Ryan Sabrina Sally
Samantha Samuel Sandra Sara Scott Sean Sergio Seth Sharon Shirley Sidney Silvia Simon Sofia Sonia
Stanley Stefan Stella Stephanie Stephen Steven Stuart Susan Suzanne Sven Sylvia Tamara Tanya Tara
Teresa Terry Theodore Thomas Tiffany Timothy Tina Todd Tomas Tracy Travis Tyler Ursula Valerie
Vanessa Vera Vernon Veronica Victor Victoria Vincent Viola Violet Virginia Vivian Walter Wanda
Warren Wayne Wendy Wesley William Yolanda Yuki Yvonne Zachary Zoe
"""
_LAST = """
Abbott Acosta Adams Adler Aguilar Ahmad Alexander Ali Allen Almeida Alvarez Andersen Anderson
Andrews Archer Armstrong Arnold Atkins Atkinson Austin Bailey Baker Baldwin Ball Ballard Banks
Barber Barker Barlow Barnes Barnett Barrett Barron Bartlett Barton Bates Bauer Baxter Beck Becker
Bell Bender Bennett Benson Berg Berger Bergman Bernard Berry Bianchi Bishop Black Blackburn Blair
Blake Blanchard Boone Booth Bowen Bowman Boyd Boyle Bradford Bradley Brady Brandt Brennan Brewer
Bridges Briggs Brock Brooks Brown Browning Bruce Bryant Buchanan Buck Buckley Burgess Burke Burnett
Burns Burton Bush Butler Byrd Byrne Cain Calderon Caldwell Callahan Cameron Campbell Campos Cannon
Cardenas Carey Carlson Carpenter Carr Carrillo Carroll Carson Carter Carver Casey Castillo Castro
Chambers Chan Chandler Chang Chapman Chase Chavez Chen Cho Christensen Church Clark Clarke Clay
Clayton Clements Cline Cobb Cochran Cohen Cole Coleman Collier Collins Combs Conley Conner Connolly
Conrad Contreras Conway Cook Cooper Copeland Cortez Costa Cowan Cox Crane Crawford Cross Cruz
Cummings Cunningham Curry Curtis Dalton Daniels Daugherty Davenport Davidson Davies Davis Dawson
Day Decker Delaney Delgado Dempsey Dennis Desai Diaz Dickson Dillon Dixon Dodson Doherty Donovan
Dorsey Dougherty Douglas Doyle Drake Dudley Duffy Duncan Dunlap Dunn Duran Durham Dyer Eaton
Edwards Elliott Ellis Emerson England English Erickson Espinoza Estrada Evans Everett Ewing Farley
Farmer Farrell Faulkner Ferguson Fernandez Ferrari Field Fields Figueroa Finley Fischer Fisher
Fitzgerald Fleming Fletcher Flores Flynn Foley Forbes Ford Foster Fowler Fox Franklin Frazier
Freeman French Frost Fry Fuentes Fuller Gaines Gallagher Gallegos Galloway Garcia Gardner Garner
Garrett Garrison Garza Gates Gentry George Gibbs Gibson Gilbert Giles Gill Gilmore Glass Glenn
Glover Goldberg Gomez Gonzalez Good Goodman Goodwin Gordon Gould Graham Grant Graves Gray Green
Greene Greer Griffin Griffith Grimes Gross Guerra Guerrero Gupta Guthrie Gutierrez Guzman Haas Hale
Hall Hamilton Hammond Hampton Hancock Hanna Hansen Hanson Hardin Harding Hardy Harmon Harper
Harrington Harris Harrison Hart Hartman Harvey Hawkins Hayden Hayes Haynes Heath Hebert Henderson
Hendricks Henry Hensley Herman Hernandez Herrera Hess Hester Hicks Higgins Hill Hines Hobbs Hodge
Hodges Hoffman Hogan Holden Holland Holloway Holmes Holt Hood Hooper Hoover Hopkins Horn Horton
House Houston Howard Howe Howell Huang Hubbard Huber Hudson Huff Huffman Hughes Hull Humphrey Hunt
Hunter Hurley Hurst Hussain Hutchinson Ibarra Ingram Irwin Ito Jackson Jacobs Jacobson James Jansen
Jarvis Jefferson Jenkins Jennings Jensen Jimenez Johansson Johns Johnson Johnston Jones Joseph
Juarez Kane Kaufman Keller Kelley Kemp Kennedy Kent Kerr Khan Kim King Kirby Klein Knapp Knight
Knox Koch Kowalski Kramer Krause Krueger Kumar Lamb Lambert Lancaster Lane Lang Larsen Larson
Lawson Leach Leblanc Lee Lehmann Leon Leonard Levine Levy Lin Lindsey Little Livingston Long Lopez
Love Lowe Lowery Lucero Luna Lynch Lyons Macdonald Macias Mack Madden Maddox Mahoney Maldonado
Malone Mann Manning Marks Marquez Marsh Marshall Martinez Mason Massey Mathews Maxwell May Mayer
Maynard Mayo Mcbride Mccall Mccarthy Mcclure Mcconnell Mccormick Mccoy Mccullough Mcdaniel Mcdonald
Mcgee Mcgrath Mcguire Mcintosh Mcintyre Mckay Mckenzie Mckinney Mclean Mcmahon Mcmillan Mcpherson
Meadows Medina Mejia Melendez Mendez Mendoza Mercer Merritt Meyer Meyers Middleton Miles Miller
Mills Miranda Mitchell Molina Monroe Montgomery Montoya Moody Moon Moore Morales Moran Moreno
Moretti Morris Morrison Morrow Morse Morton Moses Mosley Moss Mueller Mullen Mullins Munoz Murphy
Murray Myers Nakamura Nash Navarro Neal Nelson Newman Newton Nguyen Nichols Nicholson Nielsen Nixon
Noble Nolan Norris Norton Novak Nunez Ochoa Oconnor Odonnell Olsen Olson Oneill Orozco Orr Ortega
Ortiz Osborne Owens Pace Pacheco Padilla Page Palmer Park Parker Parks Parrish Parsons Patel
Patterson Patton Payne Pearson Peck Pena Pennington Perez Perkins Perry Peters Petersen Peterson
Petrov Phelps Phillips Pierce Pittman Pitts Pollard Poole Pope Porter Potter Potts Powell Powers
Pratt Preston Price Prince Proctor Pruitt Quinn Ramirez Ramos Ramsey Randolph Rao Rasmussen Reed
Reese Reeves Reid Reilly Reyes Reynolds Rhodes Rice Rich Richards Richardson Richmond Riley Rios
Ritter Rivas Rivera Roach Robbins Roberson Roberts Robertson Robinson Robles Rocha Rodgers
Rodriguez Rogers Rojas Rollins Romero Rosales Rosario Ross Rossi Roth Rowe Rowland Rubio Rush Russo
Salas Salazar Salinas Sampson Sanchez Sanders Sandoval Santana Santiago Santos Sato Saunders Savage
Sawyer Schaefer Schmidt Schneider Schroeder Schultz Schwartz Sellers Serrano Sexton Shaffer Shah
Shannon Sharma Sharp Shaw Shelton Shepherd Sheppard Sherman Shields Short Silva Simmons Simpson
Sims Singh Singleton Skinner Slater Sloan Small Smith Snow Snyder Solis Solomon Sosa Soto Sparks
Spears Spencer Stafford Stanton Stark Steele Stein Stephens Stephenson Stevens Stevenson Stewart
Stokes Stone Stout Strickland Strong Suarez Sullivan Summers Sutton Suzuki Swanson Sweeney Sweet
Sykes Takahashi Tanaka Tanner Tate Taylor Temple Terrell Thompson Thornton Tran Trevino Trujillo
Tucker Turner Tyson Underwood Valdez Valencia Valentine Valenzuela Vance Vargas Vasquez Vaughn
Vazquez Vega Velasquez Velez Villa Villanueva Vogel Wade Wagner Walker Wall Wallace Waller Walsh
Walters Walton Wang Ward Ware Warner Washington Waters Watkins Watson Watts Weaver Webb Weber
Webster Weeks Weiss Welch Wells West Wheeler Whitaker White Whitehead Whitfield Whitney Wiggins
Wilcox Wilder Wiley Wilkerson Wilkins Wilkinson Willis Wilson Winters Wise Wolf Wolfe Wong Wood
Woodard Woods Woodward Wright Wu Wyatt Yang Yates Yoder York Young Yu Zamora Zhang Zhao Ziegler
Zimmerman
"""
FIRST_NAMES, LAST_NAMES = tuple(_FIRST.split()), tuple(_LAST.split())
MOST_NAMES = len(FIRST_NAMES) * len(LAST_NAMES)


def unique_names(
    generator: random.Random, count: int, first: int = len(FIRST_NAMES), last: int = len(LAST_NAMES)
) -> list[str]:
    """`count` different full names in random order; all first and last names are equally likely.

    first, last: how many of the first and last names are in use, spread over the lists.
    """
    assert count <= first * last, "more names than there are"
    firsts, lasts = _spread(FIRST_NAMES, first), _spread(LAST_NAMES, last)
    return [
        f"{firsts[number // last]} {lasts[number % last]}"
        for number in generator.sample(range(first * last), count)
    ]


def _spread(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(names[at * len(names) // count] for at in range(count))
