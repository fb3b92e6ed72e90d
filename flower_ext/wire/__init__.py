"""What travels: sparse arrays, masks, codes for values, and what all of it costs."""
