"""`relay serve` and `relay run`: routes at work in one process.

server                    engines, signals, reload, the exit code
fleet                     all routes, and the exchange of some for others
route                     what every route has: its listeners, who may come in, its end
stream_route, duplex_route, staged_route    its pipelines; its sessions; sessions with stages
pipelines                 those of a stream_route that are at work
changes                   stages that change while their route is at work
facts                     what there is to tell of a route at a moment
reception, admission      who listens, and who may come in
introductions             proxies that have yet to say for whom they connect
names, redial             what resolvers say; a source that connects again
resumption                logs of an earlier run, which go on first
spilling                  which sinks read through a log
heap                      its memory, in the long run
vigil, notify             what is done by the clock: signs of life, the end of an idle relay; the service manager
running, welcome          a route from words instead of YAML; what is said when all is ready
"""
