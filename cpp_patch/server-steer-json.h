// server-steer-json.h - values of a request, taken out of its JSON with a sentence for what is wrong; for the server-steer-*.cpp files.
#ifndef SERVER_STEER_JSON_H
#define SERVER_STEER_JSON_H

#include "server-steer.h"

namespace server_steer_json {

constexpr size_t MAX_TERMS = 64; // one bit each in the set of active terms

inline const char * const SITES[LLAMA_STEER_SITE_COUNT] = { "resid_post", "attn_out", "ffn_out" };

[[noreturn]] inline void bad(const std::string & message) {
    throw server_steer_error(400, message);
}

inline std::string shown(const std::string & text) {
    return "'" + (text.size() <= 60 ? text : text.substr(0, 57) + "...") + "'";
}

inline std::string shown(const json & value) {
    return shown(value.dump_safe());
}

inline int32_t index_of(const char * const * names, int32_t n, const std::string & name) {
    for (int32_t i = 0; i < n; ++i) {
        if (name == names[i]) {
            return i;
        }
    }
    return -1;
}

inline std::string text_of(const json & value, const std::string & what) {
    if (!value.is_string()) {
        bad(what + " is " + shown(value) + ", not a text");
    }
    return value.get<std::string>();
}

inline int32_t small_number(const json & value, const std::string & what) {
    if (!value.is_number_integer() || value.get<int64_t>() < 0 || value.get<int64_t>() > 1000000) {
        bad(what + " is " + shown(value) + ", not a whole number from 0");
    }
    return (int32_t) value.get<int64_t>();
}

inline bool is_absent(const json & data, const char * key) {
    return !data.contains(key) || data.at(key).is_null();
}

} // namespace server_steer_json

#endif // SERVER_STEER_JSON_H
