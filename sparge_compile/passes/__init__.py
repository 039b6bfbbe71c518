"""The rewrite of a graph: find attention, decide about each site, substitute. :mod:`.pipeline` lists the order."""
