// server-steer-routes.h - the HTTP routes of steering (docs/http-protocol.md). Included in server-context.cpp, after server_res_generator.

#include "server-steer-fields.h"

namespace {

[[noreturn]] void steer_bad(const std::string & message) {
    throw server_steer_error(400, message);
}

// What GET /steering says of the model, found out when it is first asked.
struct steer_facts {
    std::mutex mutex;
    json facts = nullptr;
};

json steer_json(server_task_result & result) {
    json res = result.to_json();
    if (result.steer) {
        server_steer_merge(res, *result.steer);
    }
    return res;
}

// The steering of a completion request; false: `res` holds the error.
bool steer_parse(server_steer_store & steer, const common_chat_templates * templates, server_res_generator & res, const json & data, const std::string & id, task_response_type type, server_steer_request_ptr & out) {
    try {
        const bool raw = type == TASK_RESPONSE_TYPE_NONE || type == TASK_RESPONSE_TYPE_OAI_CMPL;
        out = steer.parse(data, id, raw ? nullptr : templates, res.steer_ticket);
        if (out && out->named) {
            res.headers["X-Steering-Request"] = out->id;
        }
        return true;
    } catch (const server_steer_error & e) {
        res.error(e.to_json());
        return false;
    }
}

// `object`: of server-steer-fields.h
json steer_body(const std::string & text, const char * object) {
    json body = server_steer_parse_object(text, "the body");
    for (const auto & entry : body.items()) {
        if (!server_steer_field_of(object, entry.key().c_str())) {
            steer_bad("unknown key '" + entry.key().substr(0, 60) + "'");
        }
    }
    return body;
}

// "?name=true", or 1; left out it is false
bool steer_switch(const server_http_req & req, const char * name) {
    const std::string value = req.get_param(name, "false");
    if (!common_arg_utils::is_truthy(value) && !common_arg_utils::is_falsey(value)) {
        steer_bad(std::string(name) + " is '" + value.substr(0, 60) + "', neither true nor false");
    }
    return common_arg_utils::is_truthy(value);
}

llama_tokens steer_tokens(const llama_vocab * vocab, const json & text, bool special, const std::string & where) {
    llama_tokens res;
    if (text.is_string()) {
        res = common_tokenize(vocab, text.get<std::string>(), special, true);
    } else if (text.is_array()) {
        const int32_t n_vocab = llama_vocab_n_tokens(vocab);
        for (size_t i = 0; i < text.size(); ++i) {
            const json & token = text.at(i);
            if (!token.is_number_integer() || token.get<int64_t>() < 0 || token.get<int64_t>() >= n_vocab) {
                steer_bad(where + " holds something that is no token id");
            }
            res.push_back((llama_token) token.get<int64_t>());
        }
    } else {
        steer_bad(where + " is neither a text nor a list of token ids");
    }
    if (res.empty()) {
        steer_bad(where + " is empty");
    }
    return res;
}

// Prompt and response of one item; the response may be left out of a prompt to read.
struct steer_item {
    llama_tokens prompt;
    llama_tokens response;
};

std::vector<steer_item> steer_items(const llama_vocab * vocab, const json & items, bool need_response) {
    const char * what = need_response ? "items" : "prompts";
    if (!items.is_array() || items.empty() || items.size() > server_steer_most("read", "prompts")) {
        steer_bad(std::string(what) + " has to be a list of 1 to 4096");
    }
    std::vector<steer_item> res;
    for (size_t i = 0; i < items.size(); ++i) {
        const json & item = items.at(i);
        const std::string where = std::string(need_response ? "item " : "prompt ") + std::to_string(i);
        steer_item one;
        if (item.is_object()) {
            for (const auto & entry : item.items()) {
                if (entry.key() != "prompt" && entry.key() != "response") {
                    steer_bad(where + " has the unknown key '" + entry.key().substr(0, 60) + "'");
                }
            }
            if (!item.contains("prompt")) {
                steer_bad(where + " has no prompt");
            }
            one.prompt = steer_tokens(vocab, item.at("prompt"), true, where);
            if (item.contains("response")) {
                one.response = steer_tokens(vocab, item.at("response"), false, "the response of " + where);
            }
        } else {
            one.prompt = steer_tokens(vocab, item, true, where);
        }
        if (need_response && one.response.empty()) {
            steer_bad(where + " has no response");
        }
        res.push_back(std::move(one));
    }
    return res;
}

// All results of a reader's tasks. A heap of texts may take long: the client is looked for after each of them.
server_response_reader::batch_response steer_wait(server_response_reader & rd, size_t n, const std::function<bool()> & should_stop) {
    server_response_reader::batch_response all;
    all.results.resize(n);
    while (rd.has_next()) {
        auto result = should_stop() ? nullptr : rd.next(should_stop);
        if (!result) {
            all.is_terminated = true;
            break;
        }
        if (result->is_error()) {
            all.error = std::move(result);
            break;
        }
        const size_t index = result->index;
        all.results.at(index) = std::move(result);
    }
    return all;
}

void steer_put(std::string & out, const void * data, size_t size) {
    out.append(static_cast<const char *>(data), size);
}

// safetensors: header, then the tensors in order. Numbers are little-endian on every machine that llama.cpp runs on.
std::string steer_safetensors(const std::vector<server_task_result_ptr> & results, const server_steer_read_spec & spec, const json & meta, size_t n_embd, size_t n_streams) {
    json header = json::object();
    header["__metadata__"] = json{ { "steer", meta.dump() } };
    size_t at = 0;
    const auto entry = [&](const std::string & name, const char * dtype, const std::vector<size_t> & shape) {
        size_t bytes = 4;
        json shape_json = json::array();
        for (size_t n : shape) {
            bytes *= n;
            shape_json.push_back(n);
        }
        json e = json{ { "dtype", dtype } };
        e["shape"] = shape_json;
        e["data_offsets"] = json::array({ at, at + bytes });
        header[name] = e;
        at += bytes;
    };
    for (size_t i = 0; i < results.size(); ++i) {
        const auto & v = *static_cast<server_task_result_steer &>(*results[i]).values;
        const std::string name = std::to_string(i);
        std::vector<size_t> shape = { spec.layers.size(), v.positions.size() };
        if (spec.streams) {
            shape.push_back(n_streams);
        }
        shape.push_back(n_embd);
        entry(name + ".values", "F32", shape);
        entry(name + ".positions", "I32", { v.positions.size() });
        entry(name + ".tokens", "I32", { v.tokens.size() });
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string res;
    res.reserve(8 + text.size() + at);
    const uint64_t length = text.size();
    for (int i = 0; i < 8; ++i) {
        res.push_back((char) (length >> 8 * i & 0xff));
    }
    res += text;
    for (const auto & result : results) {
        const auto & v = *static_cast<server_task_result_steer &>(*result).values;
        steer_put(res, v.values.data(), v.values.size() * sizeof(float));
        steer_put(res, v.positions.data(), v.positions.size() * sizeof(int32_t));
        steer_put(res, v.tokens.data(), v.tokens.size() * sizeof(llama_token));
    }
    return res;
}

} // namespace

void server_routes::init_steer_routes() {
    // every handler: make the response, do the work, turn what is thrown into an answer
    const auto route = [this](const char * key, bool asleep, std::function<void(const server_http_req &, server_res_generator &)> work) {
        steer_routes[key] = [this, asleep, work](const server_http_req & req) {
            auto res = create_response(asleep);
            try {
                work(req, *res);
            } catch (const server_steer_error & e) {
                res->error(e.to_json());
            } catch (const std::bad_alloc &) {
                res->error(server_steer_error(503, "not enough memory for this").to_json());
            } catch (const std::exception & e) {
                res->error(format_error_response(e.what(), ERROR_TYPE_INVALID_REQUEST));
            }
            return res;
        };
    };

    const auto known = std::make_shared<steer_facts>();
    route("GET /steering", true, [this, known](const server_http_req & req, server_res_generator & res) {
        std::set<std::string> ids;
        for (const auto & id : string_split<std::string>(req.get_param("ids"), ',')) {
            ids.insert(id);
        }
        json facts;
        {
            std::lock_guard<std::mutex> lock(known->mutex);
            if (known->facts.is_null()) {
                known->facts = json{
                    { "path", meta->model_path },
                    { "n_ctx", meta->slot_n_ctx },
                    { "n_vocab", meta->model_vocab_n_tokens },
                    { "n_slots", params.n_parallel },
                    { "n_gpu_layers", params.n_gpu_layers },
                };
                const auto * tmpls = meta->chat_params.tmpls.get();
                known->facts["has_chat_template"] = common_chat_templates_was_explicit(tmpls);
                known->facts["think_open"] = json(nullptr);
                known->facts["think_close"] = json(nullptr);
                try {
                    common_chat_templates_inputs inputs;
                    common_chat_msg msg;
                    msg.role = "user";
                    msg.content = "x";
                    inputs.messages = { msg };
                    inputs.use_jinja = params.use_jinja;
                    const auto chat = common_chat_templates_apply(tmpls, inputs);
                    if (!chat.thinking_start_tag.empty()) {
                        known->facts["think_open"] = chat.thinking_start_tag;
                    }
                    const auto ends = server_steer_compat::end_tags(chat, 0);
                    if (!ends.empty()) {
                        known->facts["think_close"] = ends[0];
                    }
                } catch (const std::exception &) {
                    // a template that cannot be rendered has no tags to offer
                }
                const bool has_tags = !known->facts.at("think_open").is_null() || !known->facts.at("think_close").is_null();
                known->facts["thinks_untold"] = server_steer_thinks_untold(tmpls, has_tags);
                json devices = json::array();
                for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
                    auto * dev = ggml_backend_dev_get(i);
                    const auto type = ggml_backend_dev_type(dev);
                    devices.push_back({
                        { "name", std::string(ggml_backend_dev_name(dev)) },
                        { "description", std::string(ggml_backend_dev_description(dev)) },
                        { "type", type == GGML_BACKEND_DEVICE_TYPE_CPU ? "cpu" : type == GGML_BACKEND_DEVICE_TYPE_ACCEL ? "accelerator"
                                                                                                                        : "gpu" },
                    });
                }
                known->facts["devices"] = devices;
            }
            facts = known->facts;
        }
        json answer = ctx_server.steer_store.describe(facts, ids);
        answer["admin"] = server_steer_admin(params);
        res.ok(answer);
    });

    route("POST /steering/vectors/:name", false, [this](const server_http_req & req, server_res_generator & res) {
        res.ok(ctx_server.steer_store.put_vector(req.get_param("name"), req.body, steer_switch(req, "force"), steer_switch(req, "replace")));
    });

    route("DELETE /steering/vectors/:name", true, [this](const server_http_req & req, server_res_generator & res) {
        res.ok(ctx_server.steer_store.delete_vector(req.get_param("name")));
    });

    route("POST /steering/requests/:id", false, [this](const server_http_req & req, server_res_generator & res) {
        const json body = steer_body(req.body, "change");
        const std::string id = req.get_param("id");
        if (!body.contains("steering")) {
            steer_bad("'steering' is missing: give the terms that are to act from now on, [] for none");
        }
        auto change = std::make_shared<server_steer_request>();
        change->terms = ctx_server.steer_store.parse_terms(body.at("steering"));
        ctx_server.steer_store.check_running(id);

        server_task task(SERVER_TASK_TYPE_CONTROL);
        task.id = res.rd.get_new_id();
        task.params.control_cmpl_id = id;
        task.params.control_action = SERVER_STEER_CONTROL;
        task.params.steer = change;
        res.rd.post_task(std::move(task), true);
        const auto result = res.rd.next(req.should_stop);
        if (!result) {
            return;
        }
        if (result->is_error()) {
            res.error(result->to_json());
            return;
        }
        json answer = json{ { "request_id", id } };
        answer["from_position"] = static_cast<server_task_result_steer &>(*result).positions;
        res.ok(answer);
    });

    route("POST /steering/read", false, [this](const server_http_req & req, server_res_generator & res) {
        const json body = steer_body(req.body, "read");
        auto & steer = ctx_server.steer_store;
        server_steer_request base = steer.parse_special(body, gen_chatcmplid(), res.steer_ticket);
        base.read = steer.parse_read(body, meta->slot_n_ctx);

        if (body.contains("prompts") == body.contains("messages")) {
            steer_bad("give either prompts or messages");
        }
        json prompts;
        if (body.contains("messages")) {
            std::vector<raw_buffer> files;
            json chat = json{ { "messages", body.at("messages") } };
            for (size_t i = 0; chat.at("messages").is_array() && i < chat.at("messages").size(); ++i) {
                const json & message = chat.at("messages").at(i);
                const json content = message.is_object() && message.contains("content") ? message.at("content") : json(nullptr);
                for (size_t k = 0; content.is_array() && k < content.size(); ++k) {
                    if (!content.at(k).is_object() || json_value(content.at(k), "type", std::string()) != "text") {
                        steer_bad("messages to read hold more than text: images and sound cannot be read");
                    }
                }
            }
            if (body.contains("chat_template_kwargs")) {
                chat["chat_template_kwargs"] = body.at("chat_template_kwargs");
            }
            prompts = json::array({ oaicompat_chat_params_parse(chat, meta->chat_params, files).at("prompt") });
        } else {
            prompts = body.at("prompts");
        }
        const auto items = steer_items(ctx_server.vocab, prompts, false);

        const auto & spec = *base.read;
        const size_t n_embd = steer.n_embd();
        const size_t width = n_embd * (spec.streams ? steer.n_streams() : 1) * sizeof(float);
        size_t bytes = 0;
        json n_prompt = json::array();
        std::vector<server_task> tasks;
        for (const auto & item : items) {
            llama_tokens tokens = item.prompt;
            tokens.insert(tokens.end(), item.response.begin(), item.response.end());
            const bool one = spec.is_mean() || spec.kind == server_steer_read_spec::LAST;
            bytes += (one ? 1 : spec.kind == server_steer_read_spec::LIST ? std::min(spec.list.size(), tokens.size())
                                                                          : tokens.size()) *
                     spec.layers.size() * width;
            if (bytes > (size_t) 2 << 30) {
                steer_bad("more than 2 GiB would be read: ask for fewer prompts, layers or positions");
            }
            auto request = std::make_shared<server_steer_request>(base);
            request->n_prompt = (int32_t) item.prompt.size();
            n_prompt.push_back(item.prompt.size());

            server_task task(SERVER_TASK_TYPE_COMPLETION);
            task.id = res.rd.get_new_id();
            task.tokens = server_tokens(tokens, ctx_server.mctx != nullptr);
            task.params = server_steer_compat::completion_params(ctx_server.vocab, params, meta->slot_n_ctx, meta->logit_bias_eog, json{ { "n_predict", 1 }, { "temperature", 0.0 } }, 0);
            task.params.steer = request;
            tasks.push_back(std::move(task));
        }
        res.rd.post_tasks(std::move(tasks));
        const auto all = steer_wait(res.rd, items.size(), req.should_stop);
        if (all.is_terminated) {
            return;
        }
        if (all.error) {
            res.error(all.error->to_json());
            return;
        }
        json about = json{ { "format", "steer-read-v1" } };
        about["layers"] = spec.layers;
        about["site"] = json_value(body, "site", std::string("resid_post"));
        about["stream"] = json_value(body, "stream", std::string("mean"));
        about["n_prompt"] = n_prompt;
        res.data = steer_safetensors(all.results, spec, about, n_embd, steer.n_streams());
        res.content_type = "application/octet-stream";
        res.status = 200;
    });

    route("POST /steering/logprobs", false, [this](const server_http_req & req, server_res_generator & res) {
        const json body = steer_body(req.body, "logprobs");
        auto & steer = ctx_server.steer_store;
        if (steer.has_drafts()) {
            throw server_steer_error(501, "log-probabilities cannot be had with speculative decoding: start the server without a draft model");
        }
        server_steer_request base = steer.parse_special(body, gen_chatcmplid(), res.steer_ticket);
        base.scores = true;
        if (!body.contains("items")) {
            steer_bad("'items' is missing");
        }
        std::vector<server_task> tasks;
        const auto items = steer_items(ctx_server.vocab, body.at("items"), true);
        for (const auto & item : items) {
            if (item.prompt.size() + item.response.size() >= (size_t) meta->slot_n_ctx) {
                steer_bad(string_format("prompt and response have %zu tokens, the context of a request %d", item.prompt.size() + item.response.size(), meta->slot_n_ctx));
            }
            auto request = std::make_shared<server_steer_request>(base);
            request->n_prompt = (int32_t) item.prompt.size();
            request->forced = item.response;

            server_task task(SERVER_TASK_TYPE_COMPLETION);
            task.id = res.rd.get_new_id();
            task.tokens = server_tokens(item.prompt, ctx_server.mctx != nullptr);
            task.params = server_steer_compat::completion_params(ctx_server.vocab, params, meta->slot_n_ctx, meta->logit_bias_eog,
                                                                 json{ { "n_predict", item.response.size() }, { "temperature", 0.0 }, { "backend_sampling", false } }, 0);
            // what the command line says of replies is not meant for given ones
            task.params.antiprompt.clear();
            task.params.sampling.grammar = {};
            task.params.n_cache_reuse = 0;
            task.params.t_max_predict_ms = -1;
            task.params.steer = request;
            tasks.push_back(std::move(task));
        }
        res.rd.post_tasks(std::move(tasks));
        const auto all = steer_wait(res.rd, items.size(), req.should_stop);
        if (all.is_terminated) {
            return;
        }
        if (all.error) {
            res.error(all.error->to_json());
            return;
        }
        json logprobs = json::array();
        for (const auto & result : all.results) {
            json list = json::array();
            for (double p : static_cast<server_task_result_steer &>(*result).values->logprobs) {
                list.push_back(p);
            }
            logprobs.push_back(list);
        }
        json answer = json::object();
        answer["logprobs"] = logprobs;
        res.ok(answer);
    });
}
