//! Where the programs are that the topology is made of.

use std::path::{Path, PathBuf};

use crate::Error;

/// The oldest Postgres the project supports.
const POSTGRES_MAJOR_MIN: u32 = 15;

/// The root of the checkout this crate was built in.
pub fn repository() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The `nats-server` binary: in `$TIDEMARK_TOOLS/bin`, else in the checkout's `.tools/bin`.
pub fn nats_server() -> Result<PathBuf, Error> {
    installed("nats-server")
}

/// The `k6` binary: in `$TIDEMARK_TOOLS/bin`, else in the checkout's `.tools/bin`.
pub fn k6() -> Result<PathBuf, Error> {
    installed("k6")
}

/// The folder with `initdb`, `postgres` and `createdb`: `$TIDEMARK_POSTGRES_BIN`, else the newest supported release
/// found on the path or where distributions put it.
pub fn postgres_bin() -> Result<PathBuf, Error> {
    if let Some(dir) = std::env::var_os("TIDEMARK_POSTGRES_BIN").map(PathBuf::from) {
        return match holds_postgres(&dir) {
            true => Ok(dir),
            false => Err(missing("initdb", &[dir])),
        };
    }
    let mut candidates = postgres_releases("/usr/lib/postgresql", "bin");
    candidates.extend(search_path());
    candidates.push("/usr/local/pgsql/bin".into());
    let found = candidates.iter().find(|dir| holds_postgres(dir)).cloned();
    found.ok_or_else(|| missing("initdb", &candidates))
}

/// A program on the search path, if it is there.
pub fn on_path(program: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn installed(program: &str) -> Result<PathBuf, Error> {
    let root = std::env::var_os("TIDEMARK_TOOLS").map(PathBuf::from);
    let bin = root.unwrap_or_else(|| repository().join(".tools")).join("bin");
    let path = bin.join(program);
    if path.is_file() { Ok(path) } else { Err(missing(program, &[bin])) }
}

fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// Supported releases below a folder with one subfolder a major release, newest first.
fn postgres_releases(parent: &str, bin: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut releases: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let major: u32 = entry.file_name().to_str()?.parse().ok()?;
            (major >= POSTGRES_MAJOR_MIN).then(|| (major, entry.path().join(bin)))
        })
        .collect();
    releases.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    releases.into_iter().map(|(_, path)| path).collect()
}

fn holds_postgres(dir: &Path) -> bool {
    ["initdb", "postgres", "createdb"].iter().all(|program| dir.join(program).is_file())
}

fn missing(program: &str, searched: &[PathBuf]) -> Error {
    Error::ToolMissing {
        program: program.to_owned(),
        searched: searched.iter().map(|dir| dir.display().to_string()).collect(),
    }
}
