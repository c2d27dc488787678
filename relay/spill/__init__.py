"""A sink behind a log.

sink         takes the stream for the sink, into its log
spills       all the logs of one relay: their names, their directories, the engines that read disks
directory    a directory of logs, and its lock
ages         how long the bytes in a log have waited
source       a log as a source of a stream
delivery     the log's way to its sink, over as many connections as it takes
"""
