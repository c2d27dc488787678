"""Sessions that relay both ways: the connections of one duplex route on one engine, and where they lead.

sessions, session         connections and their counterparts; what C comes back for
begun                     connects that begin in the order of accepts, whichever engine a session is for
patrol                    the watch over their time
staged, party, direction  sessions with stages: two pipelines over the same two sockets; staged_record sums them up
gauge                     what their bulk costs, and the method that follows from it
upstreams, upstream       which places there are, shared by all engines; what is known of one
balance, health           who gets which; checks of relay's own
"""
