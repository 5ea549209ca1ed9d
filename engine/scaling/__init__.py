"""How loss and abilities grow with scale: points, laws with intervals, and tests of emergence."""
