//! Services behind routes: what they answer is theirs, what the gateway answers in their place is ours.

use serde_json::{Value, json};

use super::{
    Api,
    operation::{Facets, Operation},
};
use crate::proxied::RouteConfig;

/// Methods as the document has them, and as routes do.
const METHODS: [(&str, &str); 6] = [
    ("get", "GET"),
    ("post", "POST"),
    ("put", "PUT"),
    ("patch", "PATCH"),
    ("delete", "DELETE"),
    ("options", "OPTIONS"),
];

/// Describes a route. A parameter of a path ends at a slash there; here it goes on.
pub fn describe(api: &mut Api<'_>, route: &RouteConfig) {
    let prefix = route.prefix.trim_end_matches('/');
    let below = format!("{prefix}/{{path}}");
    let root = if prefix.is_empty() { "/" } else { prefix };
    for (method, spelt) in METHODS {
        let reads = route.read_methods.iter().any(|known| known == spelt);
        let id = format!("{method}{}", root.replace('/', "-"));
        let operation = |id: String, parameters: Vec<Value>| Operation {
            method,
            id,
            tag: "services",
            summary: if reads { "Reads here" } else { "Goes to the primary" }.to_owned(),
            facets: Facets { proxied: true, waits: true, takes_body: true, ..Facets::default() },
            parameters,
            body: None,
            content: vec![("*/*", json!({}))],
            pending: None,
        };
        api.add(root, &operation(id.clone(), Vec::new()));
        let path = json!({
            "name": "path",
            "in": "path",
            "required": true,
            "description": "The rest of the path, slashes and all.",
            "schema": { "type": "string" },
        });
        api.add(&below, &operation(format!("{id}-below"), vec![path]));
    }
}
