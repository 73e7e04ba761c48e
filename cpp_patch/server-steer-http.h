// server-steer-http.h - who may use the steering routes, what a body may be, and which routes take steering fields. All of it is
// decided from the head of a request, before its body is read or a handler runs.
#ifndef SERVER_STEER_HTTP_H
#define SERVER_STEER_HTTP_H

#include "server-steer.h"

#include "arg.h"

struct common_params;

// One header of a request, "" where it is missing.
using server_steer_header = std::function<std::string(const char *)>;

// Why a request to a steering route is refused; none: it may pass. Other routes always pass.
std::optional<server_steer_error> server_steer_refusal(const common_params & params, const std::string & method, const std::string & path, const server_steer_header & header);

// The handler of a POST route, behind a check that refuses steering fields where they would be ignored.
server_http_context::handler_t server_steer_guard(const std::string & path, const server_http_context::handler_t & handler);

// The handler of every steering route of a router: 501.
server_http_res_ptr server_steer_router(const server_http_req & req);

// May the routes that upload, delete, read, score and change be used (--steering-admin)?
bool server_steer_admin(const common_params & params);

bool server_steer_is_route(const std::string & path);

// Parse a body or a file's header. Throws server_steer_error: not JSON, nested too deeply, or not an object.
json server_steer_parse_object(const std::string & text, const std::string & what);

#endif // SERVER_STEER_HTTP_H
