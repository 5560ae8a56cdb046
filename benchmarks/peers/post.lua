-- One request, the same each time: METHOD BODY_FILE "Header: value"... after wrk's "--".
-- wrk renders it once, as no request() is defined here. The result is one line of JSON, in µs.

function init(args)
  wrk.method = args[1]
  if args[2] ~= "" then
    wrk.body = assert(io.open(args[2], "rb")):read("*a")
  end
  for i = 3, #args do
    local name, value = args[i]:match("^([^:]+): (.*)$")
    wrk.headers[name] = value
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\nRESULT {"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "status": %d, ' ..
    '"broken": %d, "late": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), e.status,
    e.connect + e.read + e.write, e.timeout))
end
