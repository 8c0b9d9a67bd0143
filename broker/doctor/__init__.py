"""`homeport doctor`: what is wrong with a machine, a configuration and a daemon, and what to do about it.

facts    what was found: records without judgement
look     finds it: files, /proc, sockets; changes nothing
rules    facts to findings: pure
"""
