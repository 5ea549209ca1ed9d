"""New labelled examples made of those that there are: pure functions of a key, an example and its copy's number."""
