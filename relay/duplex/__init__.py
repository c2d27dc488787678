"""Sessions that relay both ways: the connections of one duplex route on one engine, and where they lead.

sessions                  connections and their counterparts; what C comes back for
patrol                    the watch over their time
upstreams, upstream       which places there are, shared by all engines; what is known of one
balance, health           who gets which; checks of relay's own
"""
