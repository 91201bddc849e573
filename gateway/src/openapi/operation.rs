//! One method of one path.

use http::{HeaderName, StatusCode, header};
use serde_json::{Map, Value, json};

use super::{
    field::{self, headers},
    problems,
};
use crate::{
    answer::JSON,
    config::GatewayConfig,
    forward::CONSISTENCY_STATUS,
    request::{
        CONSISTENCY_POLICY, IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED, PREFER, PREFERENCE_APPLIED,
        REQUEST_ID,
    },
    status::CACHE_STATUS,
    token_carrier::CONSISTENCY_TOKEN,
};

/// What operations are sorted by.
pub const TAGS: [(&str, &str); 6] = [
    ("views", "What the projections show, read in this region."),
    ("commands", "Changes that the domain's rules allow."),
    ("aggregates", "The log itself, by aggregate; answered at the primary."),
    ("currency", "Where this region stands."),
    ("services", "Services behind the gateway. What they answer is theirs."),
    ("regions", "What the gateways and projectors of other regions read at the primary."),
];

/// What the possible answers of an operation follow from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facets {
    /// It may wait for the region to catch up, and takes a policy.
    pub waits: bool,
    /// It shows one thing by its key, which may not be there.
    pub may_be_absent: bool,
    /// What it shows has a tag.
    pub tagged: bool,
    /// It may be kept in memory.
    pub kept: bool,
    /// It has a body.
    pub takes_body: bool,
    /// It changes an aggregate.
    pub writes: bool,
    /// It is checked by rules of the domain.
    pub commands: bool,
    /// The primary answers it.
    pub at_primary: bool,
    /// Its answer goes on until something has happened.
    pub listens: bool,
    /// It is for regions only.
    pub within: bool,
    /// A user's own service answers it.
    pub proxied: bool,
}

/// One method of one path.
pub struct Operation {
    pub method: &'static str,
    pub id: String,
    pub tag: &'static str,
    pub summary: String,
    pub facets: Facets,
    /// Of the path and the query.
    pub parameters: Vec<Value>,
    /// The schema of its body.
    pub body: Option<Value>,
    /// The media types of its answer, and their schemas.
    pub content: Vec<(&'static str, Value)>,
    /// The schema of a 202.
    pub pending: Option<Value>,
}

impl Operation {
    /// As the document has it. What is only asked about has no body.
    pub fn describe(&self, config: &GatewayConfig, method: &str) -> Value {
        let mut responses = self.answers();
        for (status, kinds) in problems::by_status(self.facets, config) {
            let code = StatusCode::from_u16(status).unwrap_or_default();
            responses.insert(status.to_string(), problems::response(code, &kinds));
        }
        let is_head = method == "head";
        if is_head {
            for response in responses.values_mut().filter_map(Value::as_object_mut) {
                response.remove("content");
            }
        }
        let id = if is_head { format!("{}-head", self.id) } else { self.id.clone() };
        let mut parameters = self.parameters.clone();
        parameters.extend(self.asked().iter().map(field::parameter));
        let mut described = json!({
            "operationId": id,
            "tags": [self.tag],
            "summary": self.summary,
            "parameters": parameters,
            "responses": responses,
        });
        if let Some(schema) = &self.body {
            described["requestBody"] =
                json!({ "required": true, "content": { JSON: { "schema": schema } } });
        }
        if self.facets.within {
            described["security"] = json!([{ "region": [] }]);
        }
        described
    }

    /// Headers that it listens to.
    fn asked(&self) -> Vec<HeaderName> {
        let Facets { waits, tagged, writes, .. } = self.facets;
        let mut names = vec![CONSISTENCY_TOKEN, REQUEST_ID];
        if waits {
            names.extend([CONSISTENCY_POLICY, PREFER]);
        }
        if tagged || writes {
            names.push(header::IF_NONE_MATCH);
        }
        if writes {
            names.extend([header::IF_MATCH, IDEMPOTENCY_KEY]);
        }
        names
    }

    /// What it comes to when all is well.
    fn answers(&self) -> Map<String, Value> {
        let content = self.content.iter();
        let content: Map<_, _> = content
            .map(|(kind, schema)| ((*kind).to_owned(), json!({ "schema": schema })))
            .collect();
        let answer = |about: &str, own: &[HeaderName], content: Map<String, Value>| json!({ "description": about, "headers": headers(own), "content": content });
        let shown = self.shown();
        let mut answers = Map::new();
        if self.facets.proxied {
            answers.insert("default".into(), answer("What the service answers.", &[], content));
            return answers;
        }
        if self.facets.writes {
            let created = [shown.as_slice(), &[header::LOCATION]].concat();
            answers.insert(
                "201".into(),
                answer("The first events of the aggregate.", &created, content.clone()),
            );
        }
        let about = if self.facets.writes { "Done." } else { "As asked for." };
        answers.insert("200".into(), answer(about, &shown, content));
        if self.facets.tagged {
            answers.insert("304".into(), answer("The tag is still right.", &shown, Map::new()));
        }
        if let Some(pending) = &self.pending {
            let own = [CONSISTENCY_STATUS, PREFERENCE_APPLIED, header::RETRY_AFTER];
            let content = Map::from_iter([(JSON.to_owned(), json!({ "schema": pending }))]);
            let about = "The region is behind, and the caller would rather be told than wait.";
            answers.insert("202".into(), answer(about, &own, content));
        }
        answers
    }

    /// Headers of a good answer.
    fn shown(&self) -> Vec<HeaderName> {
        let Facets { waits, tagged, kept, writes, at_primary, .. } = self.facets;
        let mut names = Vec::new();
        if waits || writes || at_primary {
            names.push(CONSISTENCY_STATUS);
        }
        if waits {
            names.push(PREFERENCE_APPLIED);
        }
        if !writes && (waits || at_primary) {
            names.push(header::VARY);
        }
        if tagged || writes {
            names.push(header::ETAG);
        }
        if kept {
            names.push(CACHE_STATUS);
        }
        if writes {
            names.push(IDEMPOTENCY_REPLAYED);
        }
        names
    }
}
