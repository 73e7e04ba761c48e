// server-steer-tags.h - the tags of a request as the planner takes them.
#ifndef SERVER_STEER_TAGS_H
#define SERVER_STEER_TAGS_H

#include "server-steer.h"

// Holds what the C struct points to.
struct server_steer_plan_tags {
    static constexpr size_t MAX_END = 264; // tokens of the end of a prompt in which a tag is looked for

    const server_steer_tags & tags;
    std::string prompt_end; // where no template wrote the end of the prompt
    std::vector<const char *> open, close, tool_open, tool_close;

    explicit server_steer_plan_tags(const server_steer_tags & tags)
        : tags(tags),
          open(pointers(tags.open)), close(pointers(tags.close)), tool_open(pointers(tags.tool_open)), tool_close(pointers(tags.tool_close)) {}

    llama_steer_tags native() {
        std::replace(prompt_end.begin(), prompt_end.end(), '\0', ' ');
        llama_steer_tags res = {};
        res.known = tags.known;
        res.all_tools = tags.all_tools;
        res.generation_prompt = tags.generation_prompt ? tags.generation_prompt->c_str() : nullptr;
        res.prompt_end = prompt_end.c_str();
        res.open = open.data();
        res.n_open = (int32_t) open.size();
        res.close = close.data();
        res.n_close = (int32_t) close.size();
        res.tool_open = tool_open.data();
        res.n_tool_open = (int32_t) tool_open.size();
        res.tool_close = tool_close.data();
        res.n_tool_close = (int32_t) tool_close.size();
        return res;
    }

private:
    static std::vector<const char *> pointers(const std::vector<std::string> & texts) {
        std::vector<const char *> res;
        for (const auto & text : texts) {
            res.push_back(text.c_str());
        }
        return res;
    }
};

#endif // SERVER_STEER_TAGS_H
