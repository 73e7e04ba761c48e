// server-steer-compat.h - what differs between versions of llama-server: found out by the compiler, nowhere by number.
#ifndef SERVER_STEER_COMPAT_H
#define SERVER_STEER_COMPAT_H

#include "server-schema.h"

#include <string>
#include <vector>

// Each is called with 0: an int goes to the first whose names exist here, and only then to the one with long.
namespace server_steer_compat {

template <typename C>
auto end_tags(const C & chat, int) -> decltype(std::vector<std::string>(chat.thinking_end_tags)) {
    return chat.thinking_end_tags;
}
template <typename C>
auto end_tags(const C & chat, long) -> decltype(std::vector<std::string>{ chat.thinking_end_tag }) {
    return chat.thinking_end_tag.empty() ? std::vector<std::string>{} : std::vector<std::string>{ chat.thinking_end_tag };
}

template <typename J>
auto completion_params(const llama_vocab * vocab, const common_params & base, int32_t, const std::vector<llama_logit_bias> & bias, const J & data, int)
    -> decltype(server_schema::eval_llama_cmpl_schema(vocab, base, bias, data)) {
    return server_schema::eval_llama_cmpl_schema(vocab, base, bias, data);
}
template <typename J>
auto completion_params(const llama_vocab * vocab, const common_params & base, int32_t n_ctx, const std::vector<llama_logit_bias> & bias, const J & data, long)
    -> decltype(server_schema::eval_llama_cmpl_schema(vocab, base, n_ctx, bias, data)) {
    return server_schema::eval_llama_cmpl_schema(vocab, base, n_ctx, bias, data);
}

template <typename S>
auto prompt_clear(S & slot, int) -> decltype(slot.prompt_clear()) {
    return slot.prompt_clear();
}
template <typename S>
auto prompt_clear(S & slot, long) -> decltype(slot.prompt_clear(false)) {
    return slot.prompt_clear(false);
}

template <typename P>
auto hostnames(const P & params, int) -> decltype(std::vector<std::string>(params.hostnames)) {
    return params.hostnames;
}
template <typename P>
auto hostnames(const P & params, long) -> decltype(std::vector<std::string>{ params.hostname }) {
    return { params.hostname };
}

// The origins that --cors-origins named; "" where it was not given or does not exist.
template <typename P>
auto named_origins(const P & params, int) -> decltype(std::string(params.cors_origins_explicit ? params.cors_origins : "")) {
    return params.cors_origins_explicit ? params.cors_origins : "";
}
template <typename P>
std::string named_origins(const P &, long) {
    return "";
}

} // namespace server_steer_compat

#endif // SERVER_STEER_COMPAT_H
