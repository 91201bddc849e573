// Read-your-writes under lag: writers and readers in every region while the event link of EU-West
// is slowed down, cut and healed. What this run must show:
//
//   - no answer is older than what its caller has already written or seen, unless the first word of
//     Consistency-Status says so;
//   - no 5xx but 503 replication-pending;
//   - reads that are served locally stay fast.
//
// It drives any gateways and any Toxiproxy-compatible proxy; the addresses come from the environment:
//   URL_US_EAST, URL_EU_WEST, URL_ASIA_SOUTH   public listeners of the gateways
//   URL_PROXY                                  HTTP API of the proxy; empty: no faults are made
//   DURATION_S                                 length of the run in seconds (default 30)
//   VUS                                        callers at a time (default 6)
//   LOCAL_READ_P95_MS                          bound on the 95th percentile of local reads (default 200)

import http from 'k6/http';
import { check, fail, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter, Rate, Trend } from 'k6/metrics';

const regions = {
  'us-east': __ENV.URL_US_EAST,
  'eu-west': __ENV.URL_EU_WEST,
  'asia-south': __ENV.URL_ASIA_SOUTH,
};
const names = Object.keys(regions);
const proxy = __ENV.URL_PROXY || '';
const duration_s = Number(__ENV.DURATION_S || 30);
const caller_count = Number(__ENV.VUS || 6);
const local_p95_ms = Number(__ENV.LOCAL_READ_P95_MS || 200);

const stale_answers = new Counter('stale_answers');
const unexpected_answers = new Counter('unexpected_answers');
const tokens_missing = new Counter('tokens_missing');
const pending_answers = new Counter('pending_answers');
const labelled_answers = new Counter('labelled_answers');
const forwarded = new Rate('forwarded_reads');
const local_read_ms = new Trend('local_read_ms', true);
const waited_read_ms = new Trend('waited_read_ms', true);
const write_ms = new Trend('write_ms', true);

export const options = {
  scenarios: {
    callers: { executor: 'constant-vus', exec: 'caller', vus: caller_count, duration: `${duration_s}s`, gracefulStop: '10s' },
    faults: { executor: 'per-vu-iterations', exec: 'faults', vus: 1, iterations: 1, maxDuration: `${duration_s + 10}s` },
  },
  thresholds: {
    stale_answers: ['count==0'],
    unexpected_answers: ['count==0'],
    tokens_missing: ['count==0'],
    local_read_ms: [`p(95)<${local_p95_ms}`],
    checks: ['rate==1'],
  },
  summaryTrendStats: ['min', 'med', 'p(95)', 'p(99)', 'max', 'count'],
};

http.setResponseCallback(http.expectedStatuses(200, 201, 202, 404));

// ---- A caller: one session that carries its token ------------------------------------------------

function session() {
  return { token: null, seen: {} };
}

function headers(session, extra) {
  const all = Object.assign({ 'Content-Type': 'application/json' }, extra);
  if (session.token) all['Consistency-Token'] = session.token;
  return { headers: all, timeout: '20s' };
}

function keep(session, answer) {
  const token = answer.headers['Consistency-Token'];
  if (token) session.token = token;
  else if ([200, 201, 404].includes(answer.status)) tokens_missing.add(1);
}

function problem(answer) {
  try {
    return String(answer.json('type')).split('/').pop().split(':').pop();
  } catch (_) {
    return '';
  }
}

/// Counts an answer that none may give. 503 replication-pending is the one honest 5xx.
function expected(answer, statuses) {
  const honest = statuses.includes(answer.status) || (answer.status === 503 && problem(answer) === 'replication-pending');
  if (!honest) {
    unexpected_answers.add(1);
    console.error(`${answer.request.method} ${answer.request.url}: ${answer.status} ${answer.error} ${answer.body}`);
  }
  return honest;
}

function command(session, region, name, input) {
  const answer = http.post(`${regions[region]}/v1/commands/${name}`, JSON.stringify(input), headers(session));
  write_ms.add(answer.timings.duration);
  if (!expected(answer, [200, 201])) return null;
  keep(session, answer);
  return answer.status === 503 ? null : answer.json();
}

function word(answer) {
  return (answer.headers['Consistency-Status'] || '').split(/[;,]/)[0].trim();
}

function note(answer) {
  const how = word(answer);
  forwarded.add(how === 'forwarded');
  if (how === 'local') local_read_ms.add(answer.timings.duration);
  if (how === 'waited') waited_read_ms.add(answer.timings.duration);
  if (answer.status === 202) pending_answers.add(1);
  const labelled = how === 'stale' || how === 'unverified';
  if (labelled) labelled_answers.add(1);
  return labelled;
}

/// Reads one order and holds the answer against all that this session has written and seen.
function read_order(session, region, id, policy) {
  const extra = policy ? { 'Consistency-Policy': policy } : {};
  const answer = http.get(`${regions[region]}/v1/views/order-detail/${id}`, headers(session, extra));
  // Not found says version 0: an answer like any other, and as stale as any other when it is known better.
  if (!expected(answer, [200, 202, 404])) return;
  const labelled = note(answer);
  if (answer.status !== 200 && answer.status !== 404) return;
  const version = answer.status === 404 ? 0 : answer.json('version');
  if (!labelled && version < (session.seen[id] || 0)) {
    stale_answers.add(1);
    console.error(`stale: ${region} shows ${id} at ${version}, this session knows ${session.seen[id]}`);
  }
  session.seen[id] = Math.max(session.seen[id] || 0, version);
  keep(session, answer);
}

/// Reads the customer's orders and looks for every order that this session placed for it.
function read_list(session, region, customer, ids) {
  const answer = http.get(`${regions[region]}/v1/views/orders-by-customer/${customer}?limit=100`, headers(session));
  if (!expected(answer, [200, 202])) return;
  const labelled = note(answer);
  if (answer.status !== 200) return;
  const shown = {};
  for (const item of answer.json('items')) shown[item.key] = item.version;
  for (const id of ids) {
    if (!labelled && !((session.seen[id] || 0) <= (shown[id] || 0))) {
      stale_answers.add(1);
      console.error(`stale list: ${region} shows ${id} at ${shown[id]}, this session knows ${session.seen[id]}`);
    }
  }
  keep(session, answer);
}

function pick(list) {
  return list[Math.floor(Math.random() * list.length)];
}

function unique(prefix) {
  return `${prefix}-${exec.vu.idInTest}-${exec.scenario.iterationInTest}-${Date.now().toString(36)}`;
}

export function setup() {
  for (const name of names) if (!regions[name]) fail(`the address of ${name} is not set`);
  const admin = session();
  const product = `p-${Date.now().toString(36)}`;
  check(command(admin, 'us-east', 'CreateProduct', { product_id: product, name: 'Tide table', price_cents: 2500 }), {
    'a product can be created': (answer) => answer !== null,
  });
  return { product, token: admin.token };
}

export function caller(world) {
  const own = session();
  own.token = world.token;
  const customer = unique('c');
  const order = unique('o');
  const home = pick(names);
  if (!command(own, home, 'RegisterCustomer', { customer_id: customer, name: 'Ada' })) return;
  const placed = command(own, home, 'PlaceOrder', {
    order_id: order,
    customer_id: customer,
    items: [{ product_id: world.product, quantity: 1 }],
  });
  if (!placed) return;
  own.seen[order] = placed.version;
  for (let round = 0; round < 4; round += 1) {
    read_order(own, pick(names), order, pick([null, null, 'wait;ms=100, forward', 'wait;ms=150, pending', 'eventual']));
    read_list(own, pick(names), customer, [order]);
    const added = command(own, pick(names), 'AddItem', { order_id: order, product_id: world.product, quantity: 1 });
    if (added) own.seen[order] = added.version;
    read_order(own, pick(names), order, null);
  }
  // A caller who never wrote sees a world that only moves forward.
  const reader = session();
  for (let round = 0; round < 4; round += 1) read_order(reader, pick(names), order, null);
  sleep(Math.random() / 10);
}

// ---- The weather -----------------------------------------------------------------------------------

function drive(path, body) {
  const answer = http.post(`${proxy}${path}`, JSON.stringify(body), { headers: { 'Content-Type': 'application/json' } });
  check(answer, { 'the proxy takes orders': (r) => r.status >= 200 && r.status < 300 });
}

const slow = { name: 'lag_spike', type: 'latency', stream: 'downstream', attributes: { latency: 400, jitter: 50 } };

export function faults() {
  if (!proxy) return;
  const act = duration_s / 6;
  sleep(act);
  drive('/proxies/events-eu-west/toxics', slow);
  sleep(act);
  check(http.del(`${proxy}/proxies/events-eu-west/toxics/lag_spike`), { 'the lag ends': (r) => r.status < 300 });
  sleep(act);
  drive('/proxies/events-eu-west', { enabled: false });
  sleep(act);
  drive('/proxies/events-eu-west', { enabled: true });
}

export function teardown() {
  if (proxy) drive('/proxies/events-eu-west', { enabled: true });
}
