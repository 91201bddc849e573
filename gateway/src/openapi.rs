//! `GET /openapi.json`: what this gateway takes and answers, made of the types that do it.
//!
//! The paths come from the router's table, the domain and the configured routes; bodies from the types that
//! are decoded and encoded; problems from the closed list of their types. What is added to one of them
//! without being described does not compile.

mod field;
mod operation;
mod paths;
mod problems;
mod proxied;
mod schemas;
pub mod terms;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use http::StatusCode;
use projection::Domain;
use serde_json::{Map, Value, json};

use self::{operation::Operation, schemas::Schemas};
use crate::{
    answer::Answer,
    config::{AuthMode, GatewayConfig},
    error::Error,
    hop,
    problem::Kind,
    request::Call,
    service::Route,
};

/// The path.
pub const PATH: &str = "/openapi.json";

const ABOUT: &str = "A read-your-writes gateway. Every answer carries a `Consistency-Token`; a request that \
sends it back is never shown a world older than the one that its caller has written or seen. Paths take the \
methods that are listed and answer all others with 405 `method-not-allowed`. Parameters that are not listed are \
refused.";

/// Answers with the description.
pub fn answer(call: &Call, document: &Bytes) -> Result<Answer, Error> {
    call.only_parameters(&[])?;
    Ok(Answer::typed(StatusCode::OK, crate::answer::JSON, document.clone()))
}

/// The description of a gateway that is configured so, for this domain.
pub fn document(config: &GatewayConfig, domain: &Domain) -> Bytes {
    let mut api = Api { config, domain, schemas: Schemas::default(), paths: Map::new() };
    for (pattern, route) in Route::ALL {
        paths::describe(&mut api, pattern, route);
    }
    for route in &config.routes {
        proxied::describe(&mut api, route);
    }
    Bytes::from(api.finish().to_string())
}

/// The description under way.
struct Api<'a> {
    config: &'a GatewayConfig,
    domain: &'a Domain,
    schemas: Schemas,
    paths: Map<String, Value>,
}

impl Api<'_> {
    /// Adds what a path does; what is read there can be asked about as well.
    fn add(&mut self, path: &str, operation: &Operation) {
        let described = operation.describe(self.config, operation.method);
        let at = self.paths.entry(path).or_insert_with(|| json!({}));
        if operation.method == "get" {
            at["head"] = operation.describe(self.config, "head");
        }
        at[operation.method] = described;
    }

    fn finish(self) -> Value {
        let (schemes, security) = security(self.config);
        let responses = Kind::ALL.iter().map(|kind| (kind.name().to_owned(), problems::one(*kind)));
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Tidemark",
                "version": env!("CARGO_PKG_VERSION"),
                "summary": format!("The gateway of region {}", self.config.region),
                "description": ABOUT,
                "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            },
            "security": security,
            "tags": operation::TAGS.map(|(name, about)| json!({ "name": name, "description": about })),
            "paths": self.paths,
            "components": {
                "schemas": self.schemas.finish(),
                "responses": responses.collect::<Map<_, _>>(),
                "headers": field::answered(self.config),
                "parameters": field::asked(),
                "securitySchemes": schemes,
            },
        })
    }
}

/// How callers and regions prove who they are, and what is asked of callers.
fn security(config: &GatewayConfig) -> (Value, Value) {
    let region = json!({
        "type": "apiKey",
        "in": "header",
        "name": hop::CREDENTIAL.as_str(),
        "description": "Shared by the gateways and projectors of all regions.",
    });
    let caller = match config.auth.mode {
        AuthMode::None => None,
        AuthMode::Jwt => Some(json!({
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
        })),
        AuthMode::TrustedHeader => config.auth.trusted_header.as_ref().map(|trusted| {
            json!({
                "type": "apiKey",
                "in": "header",
                "name": trusted.name.as_str(),
                "description": "Set by the load balancer in front; of anybody else it is not believed.",
            })
        }),
    };
    match caller {
        None => (json!({ "region": region }), json!([])),
        Some(caller) => (json!({ "region": region, "caller": caller }), json!([{ "caller": [] }])),
    }
}
