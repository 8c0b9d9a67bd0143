"""What clients write and what they read back: pure functions and machines. No clock, no socket, no waiting.

fields          one typed, bounded read of a JSON object's field; every refusal names the field by its path
json_in         strict JSON text to Python values
items           conversation items, their canonical digest, and their grouping into turns
item_json       items as the API lists them
window          what a compaction item holds
requests        a `response.create` body to a `TurnRequest`
context         its fields that say what the prompt is made of, beside the items
retention       how long clients ask their KV to be kept
metadata        pairs of strings that clients hang on things
ws_frames       a WebSocket text frame to what is to be done about it
article         the dialect without `type` fields, and the loop that continues by itself
toolcalls       sampled text to text and tool calls, as it streams
responses_out   a turn's progress to numbered events and the response object
chat_in         a Chat Completions body to a `TurnRequest`
chat_out        a turn's events to Chat Completions' chunks and completion
messages_prompt what a Messages prompt is made of, as items and as blocks
messages_in     an Anthropic Messages body to a `TurnRequest`
messages_out    a turn's events to Messages events and the Message
messages_ids    one id under the prefixes of each API
cache_control   Anthropic's cache breakpoints, and the usage that they make of a prompt
sse             an event to bytes
"""
