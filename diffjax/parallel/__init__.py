"""Devices: finding them, saying what is wrong with them, and splitting arrays over them."""
