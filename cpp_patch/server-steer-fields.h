// clang-format off: a table
// server-steer-fields.h - every field that steering adds to a request, declared once. The checks of keys and bounds use this table, and
// scripts/protocol.py makes the tables of docs/http-protocol.md from it: one field a line.
#ifndef SERVER_STEER_FIELDS_H
#define SERVER_STEER_FIELDS_H

#include "../../src/llama-steer-plan.h"

#include <cstddef>
#include <cstring>

struct server_steer_field {
    const char * object;   // what it is a field of
    const char * name;
    const char * type;
    double       least;    // of a number, or of the entries of a list, the bytes of a text
    double       most;
    const char * fallback; // "": it has to be there
    const char * text;     // Markdown
};

constexpr server_steer_field SERVER_STEER_FIELDS[] = {
    { "request",  "steering",       "list",           0,    64,   "the server's default", "terms; `[]` for none" },
    { "request",  "steering_probe", "list of texts",  0,    16,   "none", "vector names: each token's projection on them is sent along" },
    { "request",  "steering_tags",  "object",         0,    0,    "those of the chat template", "the tags around thinking and around tool calls; what is given here wins" },
    { "request",  "request_id",     "text",           1,    64,   "made by the server", "a name for this request, of `A-Z a-z 0-9 . _ : -`; it must not be in use (409)" },
    { "term",     "vector",         "text",           1,    64,   "", "the name of a vector that is loaded" },
    { "term",     "strength",       "number",         -1e15, 1e15, "1", "times the vector's scale at most 1e15; with `project` from -1 to 3, with `floor` and `cap` from 0 to 1" },
    { "term",     "level",          "number",         -1e15, 1e15, "none", "of `floor` and `cap`, which need one: where the bound lies, in units of the vector's scale" },
    { "term",     "layers",         "pair",           2,    2,    "all of the vector's", "first and last block, both included; `[10, null]` has no end" },
    { "term",     "op",             "text",           0,    0,    "the vector's", "`add`, `project`, `clamp`, `renorm`, `floor` or `cap`" },
    { "term",     "scope",          "text",           0,    0,    "the vector's", "`all`, `prompt`, `response`, `thinking`, `answer`, or positions such as `5-20` or `0-`" },
    { "term",     "stream",         "whole number",   0,    1000000, "all streams", "one hyper-connection stream" },
    { "term",     "schedule",       "object",         0,    0,    "constant", "how the strength decays over the response ([what it means](grammar.md#schedules))" },
    { "term",     "gate",           "text",           1,    64,   "none", "a gate, uploaded like a vector, that decides on the prompt whether the term acts ([how](grammar.md#gates))" },
    { "schedule", "kind",           "text",           0,    0,    "", "`constant`, `linear` or `cosine`" },
    { "schedule", "over",           "whole number",   1,    LLAMA_STEER_MAX_OVER, "", "tokens of the response until the strength has come down; not with `constant`. It is held for 1/64 of them at a time" },
    { "schedule", "floor",          "number",         0,    1,    "0", "the part of the strength that is left then" },
    { "tags",     "open",           "text or list",   1,    16,   "none", "what opens thinking" },
    { "tags",     "close",          "text or list",   1,    16,   "none", "what closes it" },
    { "tags",     "tool_open",      "text or list",   1,    16,   "none", "what a tool call begins with" },
    { "tags",     "tool_close",     "text or list",   1,    16,   "none", "what ends it; without one it lasts to the end" },
    { "read",     "prompts",        "list",           1,    4096, "", "texts, lists of token ids, or `{\"prompt\": text or ids, \"response\": text or ids}`: the two are tokenized on their own and joined" },
    { "read",     "messages",       "list",           1,    4096, "", "in place of `prompts`: one chat of texts, rendered by the template with the generation prompt" },
    { "read",     "chat_template_kwargs", "object",   0,    0,    "none", "for the template, with `messages`" },
    { "read",     "layers",         "list",           1,    1000000, "all that can be read there", "block indices" },
    { "read",     "positions",      "text or list",   1,    1000000, "`\"last\"`", "`\"last\"`, `\"all\"`, `\"mean\"` (of all but position 0, one row), `\"response\"`, `\"response_mean\"`, or positions within the context; -1 is the last. Each is read once, in order" },
    { "read",     "site",           "text",           0,    0,    "`\"resid_post\"`", "`\"resid_post\"`, `\"attn_out\"` or `\"ffn_out\"`" },
    { "read",     "stream",         "text",           0,    0,    "`\"mean\"`", "`\"mean\"` or `\"all\"`" },
    { "read",     "steering",       "list",           0,    64,   "none", "terms, whatever the server's default" },
    { "read",     "steering_tags",  "object",         0,    0,    "none", "as above" },
    { "read",     "request_id",     "text",           1,    64,   "made by the server", "as above" },
    { "logprobs", "items",          "list",           1,    4096, "", "`{\"prompt\": text or ids, \"response\": text or ids}`" },
    { "logprobs", "steering",       "list",           0,    64,   "none", "terms, whatever the server's default" },
    { "logprobs", "steering_tags",  "object",         0,    0,    "none", "as above" },
    { "logprobs", "request_id",     "text",           1,    64,   "made by the server", "as above" },
    { "change",   "steering",       "list",           0,    64,   "", "terms that act from now on; `[]` for none" },
};

// The declaration of a field; null: the object has no such field.
inline const server_steer_field * server_steer_field_of(const char * object, const char * name) {
    for (const auto & field : SERVER_STEER_FIELDS) {
        if (!strcmp(field.object, object) && !strcmp(field.name, name)) {
            return &field;
        }
    }
    return nullptr;
}

// The most that a field may be or hold. The field has to be declared.
inline double server_steer_most(const char * object, const char * name) { return server_steer_field_of(object, name)->most; }

#endif // SERVER_STEER_FIELDS_H
