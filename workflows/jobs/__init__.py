"""Jobs on a Ray cluster: submit, watch and stop them."""
