//! The paths of the router, spelt out for the domain.

use std::collections::{BTreeMap, BTreeSet};

use consistency::{Position, Version};
use projection::{
    AggregateDefinition, CommandDefinition, LIST_KEY_BYTES_MAX, SchemaOf, SearchFields, ViewKind,
};
use serde_json::{Value, json};

use super::{
    Api,
    operation::{Facets, Operation},
    schemas::with,
    terms,
};
use crate::{
    aggregates::{EVENTS_DEFAULT, EVENTS_MAX, EventsBody, StateBody},
    answer::JSON,
    internal, log_stream,
    overview::Overview,
    pending::Pending,
    problem::Problem,
    read::{CURSOR_CHARS_MAX, Item, Page, Sums},
    service::Route,
    write::{Body, Written},
};

const READS_AGGREGATE: Facets = Facets {
    waits: false,
    may_be_absent: false,
    tagged: false,
    kept: false,
    takes_body: false,
    writes: false,
    commands: false,
    at_primary: true,
    listens: false,
    within: false,
    proxied: false,
};
const WRITES: Facets = Facets { takes_body: true, writes: true, ..READS_AGGREGATE };

/// Describes what is behind one pattern of the router.
pub fn describe(api: &mut Api<'_>, pattern: &str, route: Route) {
    let domain = api.domain;
    match route {
        Route::AggregateEvents => {
            for aggregate in domain.aggregates() {
                events(api, pattern, Some(aggregate));
            }
            events(api, pattern, None);
        }
        Route::Aggregate => {
            for aggregate in domain.aggregates() {
                state(api, pattern, aggregate);
            }
        }
        Route::Command => {
            for definition in domain.commands() {
                command(api, pattern, definition);
            }
        }
        Route::Row => views(api, pattern, |kind| !matches!(kind, ViewKind::Search(_))),
        Route::Search => views(api, pattern, |kind| matches!(kind, ViewKind::Search(_))),
        Route::Currency => currency(api, pattern),
        Route::CurrencyEvents => currency_events(api, pattern),
        Route::OpenApi => described(api, pattern),
        Route::InternalLog => log(api, pattern),
        Route::InternalAggregate => log_of_aggregate(api, pattern),
        Route::InternalEpochs => epochs(api, pattern),
    }
}

fn get(id: impl Into<String>, tag: &'static str, summary: impl Into<String>) -> Operation {
    Operation {
        method: "get",
        id: id.into(),
        tag,
        summary: summary.into(),
        facets: Facets::default(),
        parameters: Vec::new(),
        body: None,
        content: Vec::new(),
        pending: None,
    }
}

fn post(id: String, tag: &'static str, summary: String, body: Value) -> Operation {
    Operation { method: "post", body: Some(body), facets: WRITES, ..get(id, tag, summary) }
}

fn path_parameter(name: &str, schema: &Value) -> Value {
    json!({ "name": name, "in": "path", "required": true, "schema": schema })
}

fn query(name: &str, about: &str, schema: &Value) -> Value {
    json!({ "name": name, "in": "query", "description": about, "schema": schema })
}

fn whole(minimum: u64, maximum: u64, default: u64) -> Value {
    json!({ "type": "integer", "minimum": minimum, "maximum": maximum, "default": default })
}

/// A key that is no aggregate's id.
fn free_key() -> Value {
    let pattern = "^[^\\u0000-\\u001f\\u007f-\\u009f]+$";
    json!({ "type": "string", "minLength": 1, "maxLength": LIST_KEY_BYTES_MAX, "pattern": pattern })
}

/// Events of one known type of aggregates, or of any.
fn events(api: &mut Api<'_>, pattern: &str, aggregate: Option<&AggregateDefinition>) {
    let named = aggregate.map_or("any", |known| known.kind().as_str());
    let path = match aggregate {
        Some(known) => pattern.replace("{type}", known.kind().as_str()),
        None => pattern.to_owned(),
    };
    let kind = aggregate.is_none().then(|| {
        let name = api.schemas.asked::<terms::Name>();
        path_parameter("type", &name)
    });
    let id = path_parameter("id", &api.schemas.asked::<terms::AggregateId>());
    let parameters: Vec<Value> = kind.into_iter().chain([id]).collect();
    let appends = post(
        format!("append-{named}"),
        "aggregates",
        "Appends events, which nothing checks but whoever folds them".to_owned(),
        appended(api, aggregate),
    );
    let content = vec![(JSON, api.schemas.answered::<Written<'_>>())];
    api.add(&path, &Operation { parameters: parameters.clone(), content, ..appends });
    let from = query("from_version", "The first one.", &whole(0, Version::MAX.get(), 1));
    let limit = query("limit", "How many at most.", &whole(1, EVENTS_MAX, EVENTS_DEFAULT));
    let reads = get(format!("events-of-{named}"), "aggregates", "Its events, as committed");
    let operation = Operation {
        facets: READS_AGGREGATE,
        parameters: parameters.into_iter().chain([from, limit]).collect(),
        content: vec![(JSON, api.schemas.answered::<EventsBody<'_>>())],
        ..reads
    };
    api.add(&path, &operation);
}

/// The body of an append: events that the aggregate's rules know, or any others.
fn appended(api: &mut Api<'_>, aggregate: Option<&AggregateDefinition>) -> Value {
    let body = api.schemas.asked::<Body>();
    let known =
        aggregate.and_then(|known| api.domain.schemas().of_aggregate(known.kind().as_str()));
    let Some(known) = known else { return body };
    let variants = api.schemas.asked_as(known.event);
    let variants = variants["oneOf"].as_array().cloned().unwrap_or_default();
    let mut names = Vec::new();
    let mut forms = Vec::new();
    for variant in &variants {
        let Some((name, data)) = variant["properties"].as_object().and_then(|it| it.iter().next())
        else {
            continue;
        };
        let version = api.domain.upcasters().current(name);
        names.push(name.clone());
        forms.push(json!({
            "type": "object",
            "title": name,
            "description": variant["description"],
            "properties": {
                "type": { "const": name },
                "schema_version": { "const": version },
                "data": data,
            },
            "required": ["type", "schema_version", "data"],
            "additionalProperties": false,
        }));
    }
    let other = body.pointer("/properties/events/items").cloned().unwrap_or_default();
    let title = json!({ "allOf": [other["properties"]["type"], { "not": { "enum": names } }] });
    forms.push(with(other, "/properties/type", title));
    with(body, "/properties/events/items", json!({ "anyOf": forms }))
}

fn state(api: &mut Api<'_>, pattern: &str, aggregate: &AggregateDefinition) {
    let kind = aggregate.kind().as_str();
    let body = api.schemas.answered::<StateBody<'_>>();
    let shape = api.domain.schemas().of_aggregate(kind).map(|known| known.state);
    let body = shown_in(api, body, "/properties/state", shape);
    let operation = Operation {
        facets: Facets { may_be_absent: true, tagged: true, ..READS_AGGREGATE },
        parameters: vec![path_parameter("id", &api.schemas.asked::<terms::AggregateId>())],
        content: vec![(JSON, body)],
        ..get(format!("state-of-{kind}"), "aggregates", "Its state, folded from the log")
    };
    api.add(&pattern.replace("{type}", kind), &operation);
}

fn command(api: &mut Api<'_>, pattern: &str, definition: &CommandDefinition) {
    let name = definition.name().as_str();
    let body = api.schemas.asked_as(definition.schema());
    let about = body["description"].as_str().unwrap_or(name).to_owned();
    let operation = Operation {
        facets: Facets { commands: true, ..WRITES },
        content: vec![(JSON, api.schemas.answered::<Written<'_>>())],
        ..post(name.to_owned(), "commands", about, body)
    };
    api.add(&pattern.replace("{command}", name), &operation);
}

/// Every view of the kinds that the pattern is for, each once, whatever the number of versions.
fn views(api: &mut Api<'_>, pattern: &str, is_it: impl Fn(ViewKind) -> bool) {
    let domain = api.domain;
    let all = domain.projections().iter().flat_map(|projection| projection.views());
    let kinds: BTreeMap<&str, ViewKind> = all
        .map(|view| (view.name().as_str(), view.kind()))
        .filter(|(_, kind)| is_it(*kind))
        .collect();
    for (name, kind) in kinds {
        view(api, &pattern.replace("{view}", name), name, kind);
    }
}

fn view(api: &mut Api<'_>, path: &str, name: &str, kind: ViewKind) {
    let shape = api.domain.schemas().of_view(name);
    let id = path_parameter("key", &api.schemas.asked::<terms::AggregateId>());
    let free = path_parameter("key", &free_key());
    let facets = Facets { waits: true, ..Facets::default() };
    let row = Facets { may_be_absent: true, tagged: true, kept: true, ..facets };
    let (summary, facets, parameters, body) = match kind {
        ViewKind::Row => {
            let version = json!({ "type": "integer", "minimum": 0, "maximum": Version::MAX });
            let about = "The version that the row must have reached; for use by hand.";
            let parameters = vec![id, query("min_version", about, &version)];
            let body = api.schemas.answered::<Item<'_>>();
            ("A row", row, parameters, shown_in(api, body, "/properties/data", shape))
        }
        ViewKind::List => {
            let parameters = [free].into_iter().chain(page(api)).collect();
            ("A page of a list", facets, parameters, page_of(api, shape))
        }
        ViewKind::Rollup => {
            let facets = Facets { may_be_absent: true, ..facets };
            ("Sums and maxima", facets, vec![free], api.schemas.answered::<Sums<'_>>())
        }
        ViewKind::Search(fields) => {
            let parameters = searched(fields).into_iter().chain(page(api)).collect();
            ("What is found, the oldest first", facets, parameters, page_of(api, shape))
        }
    };
    let operation = Operation {
        facets,
        parameters,
        content: vec![(JSON, body)],
        pending: Some(api.schemas.answered::<Pending>()),
        ..get(name, "views", summary)
    };
    api.add(path, &operation);
}

/// `body` with what the domain says is in it.
fn shown_in(api: &mut Api<'_>, body: Value, pointer: &str, shape: Option<SchemaOf>) -> Value {
    match shape {
        Some(shape) => with(body, pointer, api.schemas.answered_as(shape)),
        None => body,
    }
}

fn page_of(api: &mut Api<'_>, shape: Option<SchemaOf>) -> Value {
    let body = api.schemas.answered::<Page<'_>>();
    shown_in(api, body, "/properties/items/items/properties/data", shape)
}

fn page(api: &Api<'_>) -> [Value; 2] {
    let read = &api.config.read;
    let limit = whole(1, u64::from(read.page_items_max), u64::from(read.page_items_default));
    let cursor = json!({ "type": "string", "maxLength": CURSOR_CHARS_MAX });
    [
        query("limit", "Items of the page at most.", &limit),
        query("cursor", "`next_cursor` of the page before.", &cursor),
    ]
}

fn searched(fields: SearchFields) -> Vec<Value> {
    let text = json!({
        "type": "string", "maxLength": LIST_KEY_BYTES_MAX, "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]*$",
    });
    let number = json!({ "type": "integer", "format": "int64" });
    let SearchFields { number: field, label, .. } = fields;
    vec![
        query("q", "Words to be found; `-` before one that must not be.", &text),
        query(&format!("{field}_min"), "The least.", &number),
        query(&format!("{field}_max"), "The most.", &number),
        query(label, "Exactly this.", &text),
    ]
}

fn currency(api: &mut Api<'_>, path: &str) {
    let content = vec![(JSON, api.schemas.answered::<Overview>())];
    let operation = get("currency", "currency", "Positions, lag and parked aggregates");
    api.add(path, &Operation { content, ..operation });
}

fn currency_events(api: &mut Api<'_>, path: &str) {
    let about = "The same whenever it changes, as server-sent events; with a token it ends with `caught-up`";
    let token = json!({ "type": "string" });
    let views = api.domain.projections().iter().filter(|projection| !projection.is_on_demand());
    let views = views.flat_map(|projection| projection.views());
    let views: BTreeSet<&str> = views.map(|view| view.name().as_str()).collect();
    let operation = Operation {
        facets: Facets { listens: true, ..Facets::default() },
        parameters: vec![
            query("token", "What the region is to catch up with.", &token),
            query("view", "For which view; for all unless said.", &json!({ "enum": views })),
        ],
        content: vec![("text/event-stream", json!({ "description": "`currency` events" }))],
        ..get("currency-events", "currency", about)
    };
    api.add(path, &operation);
}

fn described(api: &mut Api<'_>, path: &str) {
    // Named here so that what every problem is made of is in the document.
    api.schemas.answered::<Problem>();
    let content = vec![(JSON, json!({ "type": "object" }))];
    api.add(path, &Operation { content, ..get("openapi", "currency", "This description") });
}

const WITHIN: Facets = Facets { within: true, at_primary: false, ..READS_AGGREGATE };

fn log(api: &mut Api<'_>, path: &str) {
    let epoch = json!({ "type": "integer", "minimum": 1, "maximum": i32::MAX });
    let operation = Operation {
        facets: WITHIN,
        parameters: vec![
            query("epoch", "The newest unless said.", &epoch),
            query("after", "The position before.", &whole(0, Position::MAX.get(), 0)),
            log_limit(),
        ],
        content: vec![
            (internal::LINES, json!({ "type": "string" })),
            (log_stream::COMPACT, json!({ "type": "string" })),
        ],
        ..get("log", "regions", "Events in the order of their positions, one a line")
    };
    api.add(path, &operation);
}

fn log_of_aggregate(api: &mut Api<'_>, path: &str) {
    let epoch = json!({ "type": "integer", "minimum": 1, "maximum": i32::MAX });
    let kind = api.schemas.asked::<terms::Name>();
    let operation = Operation {
        facets: WITHIN,
        parameters: vec![
            path_parameter("type", &kind),
            path_parameter("id", &api.schemas.asked::<terms::AggregateId>()),
            query("epoch", "The newest unless said.", &epoch),
            query("from_version", "The first one.", &whole(0, Version::MAX.get(), 1)),
            log_limit(),
        ],
        content: vec![(internal::LINES, json!({ "type": "string" }))],
        ..get("log-of-aggregate", "regions", "Events of one aggregate, one a line")
    };
    api.add(path, &operation);
}

fn log_limit() -> Value {
    let limit = json!({ "type": "integer", "minimum": 0, "default": internal::EVENTS_DEFAULT });
    query("limit", &format!("At most {} are answered.", internal::EVENTS_MAX), &limit)
}

fn epochs(api: &mut Api<'_>, path: &str) {
    let start = json!({
        "type": "array",
        "prefixItems": [
            api.schemas.answered::<terms::Epoch>(),
            api.schemas.answered::<terms::Position>(),
        ],
        "minItems": 2,
        "maxItems": 2,
    });
    let operation = Operation {
        facets: WITHIN,
        content: vec![(JSON, json!({ "type": "array", "items": start }))],
        ..get("epochs", "regions", "Epochs after the first, each with the last position it kept")
    };
    api.add(path, &operation);
}
