"""Records of results to the view of a report: a module for each kind, and the rules of the verdict."""
