"""Pages that show what runs, searches and ablations found: one HTML file that needs nothing but a browser, and the same
numbers as a csv."""
