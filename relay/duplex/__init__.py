"""Sessions that relay both ways: the connections of one duplex route on one engine, and the watch over their time."""
