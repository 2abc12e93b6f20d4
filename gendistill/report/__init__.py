"""Tables, plots and the page, from run files alone."""
