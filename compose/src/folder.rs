//! Temporary folders that are removed with their owner, or by the next one when the owner was killed.

use std::fs::File;
use std::path::Path;

use tempfile::TempDir;

use crate::Error;

const PREFIX: &str = "tidemark-";

/// Locked as long as the owner lives; the system drops the lock with the process, however it ends.
const OWNER: &str = ".owner";

/// A temporary folder with an owner. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    folder: TempDir,
    _owner: File,
}

impl Folder {
    /// Creates a folder for `purpose` where the system keeps temporary files, and removes those of dead owners.
    pub(crate) fn create(purpose: &str) -> Result<Self, Error> {
        let parent = std::env::temp_dir();
        sweep(&parent);
        let failed = || Error::io("create a temporary folder");
        let folder = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{purpose}-"))
            .tempdir_in(&parent)
            .map_err(failed())?;
        let unlocked = folder.path().join(".owner-to-be");
        let owner = File::create(&unlocked).map_err(failed())?;
        owner.lock().map_err(failed())?;
        // Under its name only when it is locked, so that nobody finds it without an owner.
        std::fs::rename(unlocked, folder.path().join(OWNER)).map_err(failed())?;
        Ok(Folder { folder, _owner: owner })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn sweep(parent: &Path) {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
    for folder in ours.map(|entry| entry.path()) {
        let is_ownerless =
            File::open(folder.join(OWNER)).is_ok_and(|owner| owner.try_lock().is_ok());
        if is_ownerless {
            // Another sweeper may be at it.
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_swept_when_its_owner_is_gone_and_not_before() {
        let owned = Folder::create("test").unwrap();
        let orphan = Folder::create("test").unwrap();
        let path = orphan.path().to_path_buf();
        let Folder { folder, _owner } = orphan;
        let _ = folder.keep();
        drop(_owner);
        assert!(path.exists());
        let _next = Folder::create("test").unwrap();
        assert!(!path.exists());
        assert!(owned.path().exists());
    }
}
