"""`mmdistill prepare`: turns images from any source into a data set."""
