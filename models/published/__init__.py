"""Published models by kind; each file ends in its `ENTRIES`."""
