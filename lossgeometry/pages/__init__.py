"""Reports: one HTML file that stands alone, with charts that answer to a hand.

`page` writes sections, tables and charts, `charts` makes charts of arrays, `results` a report of
what the engine returned. Of these only `results` needs PyTorch.
"""
