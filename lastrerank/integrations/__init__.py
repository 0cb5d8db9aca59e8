"""One thin file for each library that lastrerank plugs into. Nothing here is imported before it is asked for."""
