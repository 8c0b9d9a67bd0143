"""The HTTP routes, a file for each API: what it reads, and how it answers. `broker/http.py` guards them and serves them.

body        a request's body, bounded in bytes and time
refusal     an error in the words of the API that was asked
turns       a turn run and written, in any API's words
responses   OpenAI Responses: create, and what is stored
chat        OpenAI Chat Completions: create, and what is stored
messages    Anthropic Messages: create, count, and the probes of its clients
models      which models there are
admin       probes, metrics, and what operators may do
"""
