//! `[[route]]`: a path that leads to a service of the user's own.

use consistency::{Name, Policy};
use http::{Method, Uri};
use process::config::Period;
use serde::Deserialize;

/// Paths that are ours.
const RESERVED: [&str; 2] = ["/v1", "/internal"];

/// One proxied route.
#[derive(Debug, Clone, Deserialize)]
pub struct RouteConfig {
    /// Path and everything below it, as in `/shop`; `/` is all that is not ours. The longest that fits
    /// counts. The path goes on as it came.
    pub prefix: String,
    /// The user's service in this region, as in `http://127.0.0.1:9000`.
    pub upstream: String,
    /// The projection whose currency is the service's.
    pub projection: Name,
    /// The chain of its reads; `read.policy` when it has none.
    pub policy: Option<String>,
    /// Methods that read. All others write.
    #[serde(default = "read_methods_default")]
    pub read_methods: Vec<String>,
    /// Paths under which every method reads, as of a search that is posted. Their requests are kept in
    /// memory, up to `listen.body_bytes_max`.
    #[serde(default)]
    pub read_paths: Vec<String>,
    /// Paths under which every method writes. The longest path that fits counts.
    #[serde(default)]
    pub write_paths: Vec<String>,
    /// Bound on a request until its answer begins; `listen.request_timeout` when it has none.
    pub timeout: Option<Period>,
    /// Bound on a body that stands still.
    #[serde(default = "pause_max_default")]
    pub pause_max: Period,
    /// Bytes of the body of a write.
    #[serde(default = "request_bytes_max_default")]
    pub request_bytes_max: u64,
    /// Bytes of the body of an answer.
    #[serde(default = "answer_bytes_max_default")]
    pub answer_bytes_max: u64,
    /// Requests to the service under way at once; further ones are refused as `overloaded`.
    #[serde(default = "requests_max_default")]
    pub requests_max: usize,
    /// Bound on connecting to it.
    #[serde(default = "connect_timeout_default")]
    pub connect_timeout: Period,
}

fn read_methods_default() -> Vec<String> {
    ["GET", "HEAD", "OPTIONS"].map(str::to_owned).to_vec()
}

fn pause_max_default() -> Period {
    Period::from_secs(30)
}

fn request_bytes_max_default() -> u64 {
    64 * 1024 * 1024
}

fn answer_bytes_max_default() -> u64 {
    1024 * 1024 * 1024
}

fn requests_max_default() -> usize {
    1024
}

fn connect_timeout_default() -> Period {
    Period::from_secs(1)
}

impl RouteConfig {
    /// What is wrong with it; `key` is its place in the configuration.
    pub fn mistakes(&self, key: &str) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut demand = |holds: bool, mistake: &str| {
            if !holds {
                mistakes.push(format!("{key}.{mistake}"));
            }
        };
        demand(self.prefix.starts_with('/'), "prefix: must begin with /");
        let is_ours = RESERVED.iter().any(|ours| is_below(&self.prefix, ours));
        demand(!is_ours, "prefix: must not be below /v1 or /internal");
        demand(self.authority().is_some(), "upstream: must be a URL like http://127.0.0.1:9000");
        let paths = self.read_paths.iter().chain(&self.write_paths);
        let all_below = paths.clone().all(|path| is_below(path, &self.prefix));
        demand(all_below, "read_paths, write_paths: must be below the prefix");
        demand(self.methods().is_some(), "read_methods: must be methods of HTTP");
        demand(0 < self.requests_max, "requests_max: must be above zero");
        demand(0 < self.pause_max.millis(), "pause_max: must be above zero");
        let policy = self.policy.as_deref().map(Policy::parse).and_then(Result::err);
        mistakes.extend(policy.map(|error| format!("{key}.policy: {error}")));
        mistakes
    }

    /// Host and port of the service; `None` when the URL names anything but them.
    pub fn authority(&self) -> Option<http::uri::Authority> {
        let url: Uri = self.upstream.parse().ok()?;
        let plain = url.scheme_str() == Some("http") && matches!(url.path(), "" | "/");
        url.authority().filter(|_| plain && url.query().is_none()).cloned()
    }

    /// The methods that read.
    pub fn methods(&self) -> Option<Vec<Method>> {
        self.read_methods.iter().map(|method| method.parse().ok()).collect()
    }

    /// Whether a request reads.
    pub fn reads(&self, methods: &[Method], method: &Method, path: &str) -> bool {
        let longest = |paths: &[String]| {
            paths.iter().filter(|below| is_below(path, below)).map(String::len).max()
        };
        match (longest(&self.read_paths), longest(&self.write_paths)) {
            (None, None) => methods.contains(method),
            (reads, writes) => writes < reads,
        }
    }
}

/// Whether `path` is `above` or lies below it.
pub fn is_below(path: &str, above: &str) -> bool {
    let above = above.strip_suffix('/').unwrap_or(above);
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> RouteConfig {
        let url = "http://127.0.0.1:9000";
        let least = serde_json::json!({"prefix": "/shop", "upstream": url, "projection": "orders"});
        serde_json::from_value(least).unwrap()
    }

    #[test]
    fn methods_say_what_reads_unless_the_longest_path_says_otherwise() {
        let paths = |paths: &[&str]| paths.iter().copied().map(str::to_owned).collect();
        let config = RouteConfig {
            read_paths: paths(&["/shop/search"]),
            write_paths: paths(&["/shop/log", "/shop/search/save"]),
            ..route()
        };
        let methods = config.methods().unwrap();
        let reads = |method, path| config.reads(&methods, &method, path);
        assert!(reads(Method::GET, "/shop") && reads(Method::HEAD, "/shop/a"));
        assert!(!reads(Method::POST, "/shop/a") && !reads(Method::DELETE, "/shop/a"));
        assert!(reads(Method::POST, "/shop/search") && reads(Method::POST, "/shop/search/x"));
        assert!(!reads(Method::POST, "/shop/searching"));
        assert!(!reads(Method::GET, "/shop/log") && !reads(Method::GET, "/shop/search/save"));
    }

    #[test]
    fn a_route_that_makes_no_sense_is_refused_with_all_its_mistakes() {
        assert_eq!(route().mistakes("route.0"), Vec::<String>::new());
        let wrong = RouteConfig {
            prefix: "/v1/x".to_owned(),
            upstream: "https://10.0.0.1/path".to_owned(),
            policy: Some("hope".to_owned()),
            read_paths: vec!["/elsewhere".to_owned()],
            requests_max: 0,
            ..route()
        };
        let found = wrong.mistakes("route.0").join("\n");
        for named in ["prefix", "upstream", "read_paths", "requests_max", "policy"] {
            assert!(found.contains(&format!("route.0.{named}")), "{named} is not in {found}");
        }
    }

    #[test]
    fn everything_lies_below_the_root_and_a_word_is_no_part_of_a_longer_one() {
        assert!(is_below("/a", "/") && is_below("/", "/") && is_below("/shop/", "/shop"));
        assert!(!is_below("/shopping", "/shop") && !is_below("/", "/shop"));
    }
}
