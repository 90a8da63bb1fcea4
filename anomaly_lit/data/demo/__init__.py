"""The demonstration data set, drawn by the program itself."""
