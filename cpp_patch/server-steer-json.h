// server-steer-json.h - values of a request, taken out of its JSON with a sentence for what is wrong; for the server-steer-*.cpp files.
#ifndef SERVER_STEER_JSON_H
#define SERVER_STEER_JSON_H

#include "server-steer.h"
#include "server-steer-fields.h"

namespace server_steer_json {

const size_t MAX_TERMS = (size_t) server_steer_most("request", "steering");
constexpr size_t MAX_BODY = (size_t) 64 << 20; // bytes of a vector file
constexpr size_t MAX_JSON = (size_t) 8 << 20;  // bytes of a JSON body

inline const char * const SITES[LLAMA_STEER_SITE_COUNT] = { "resid_post", "attn_out", "ffn_out" };

[[noreturn]] inline void bad(const std::string & message) {
    throw server_steer_error(400, message);
}

// A client's text in a sentence: short, and of printable bytes. (A NUL would end the sentence.)
inline std::string shown(const std::string & text) {
    std::string res = text.size() <= 60 ? text : text.substr(0, 57) + "...";
    for (char & c : res) {
        c = (unsigned char) c < 0x20 || c == 0x7f ? '?' : c;
    }
    return "'" + res + "'";
}

inline std::string shown(const json & value) {
    return shown(safe_json_to_str(value));
}

// Every key of an object is one of its declared fields.
inline void check_keys(const json & item, const char * object, const std::string & where) {
    for (const auto & entry : item.items()) {
        if (!server_steer_field_of(object, entry.key().c_str())) {
            bad(where + " has the unknown key " + shown(entry.key()));
        }
    }
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

// A whole number of 64 bits; false for all else. What is beyond them must not come out as another number.
inline bool is_whole(const json & value, int64_t & number) {
    if (!value.is_number_integer()) {
        return false;
    }
    number = value.get<int64_t>();
    return number >= 0 || value.dump()[0] == '-';
}

inline int32_t small_number(const json & value, const std::string & what) {
    int64_t number = 0;
    if (!is_whole(value, number) || number < 0 || number > 1000000) {
        bad(what + " is " + shown(value) + ", not a whole number from 0");
    }
    return (int32_t) number;
}

inline bool is_absent(const json & data, const char * key) {
    return !data.contains(key) || data.at(key).is_null();
}

} // namespace server_steer_json

#endif // SERVER_STEER_JSON_H
