"""The command line, a file for each group of commands: its pages of help, its options, and what it does.

page        what a command's help says; the tree of parsers is made of pages
tree        all of them, as one parser
failed      how a command ends that could not do its work
serving     `serve`, and the options that make a configuration
operating   `sessions`, `tiers`, `turns`, `top`, `demote`, `pin`, `unpin`, `forget`: a running daemon is asked
asking      the requests that these send
offline     `config check`, `verify`: files are read
benches     `bench`
completion  what Tab offers

Only these files print.
"""
