"""Whether an ability grows smoothly with scale or changes at a point, and what a prediction of it is worth."""
