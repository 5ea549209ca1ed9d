"""Did it help? A base setting, switches and sizes of training data; the effect of each, paired by seed."""
