"""Fewer bits a weight, with the error kept small: GPTQ on one matrix, calibration block by block, files others can read."""
