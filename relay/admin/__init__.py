"""What a running relay can be asked and told, and who asks.

status                what there is to know at one moment, frozen
inquiry, streams      gathers it from the engines
resources, rates      descriptors and pipe pages; what two looks differ by
ledger                what sessions that are over came to
metrics               what Prometheus is told
page, picture         the status page
desk                  all of this together: what can be asked and told, in one place
doors, listeners      the sockets, and a thread for each client
conversation          HTTP with one client
summary               what is said of the routes when they have begun
serving               `relay serve`: the routes, with a desk
where, client, asking, top  the other side: the commands that talk to a running relay
"""
