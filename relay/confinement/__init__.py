"""Giving up rights: what a configuration needs is worked out, the rest is given up before a stream is moved.

wants           what each part of a configuration needs: files, directories, ports
account         the user and group that relay becomes
confinement     the order in which rights go, and what a reload may still ask for
"""
