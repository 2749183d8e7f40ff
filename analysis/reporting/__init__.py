"""What goes into the report of a study: the page that is sent. No PyTorch is needed."""
