"""`mmdistill prepare`: images from anywhere become a data set."""
