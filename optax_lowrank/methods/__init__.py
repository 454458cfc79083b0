"""The methods, one file each: the update rule of the paper, its rule of one matrix, its optimizer."""
