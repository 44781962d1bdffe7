//! Finds the folder of a data set.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The environment variable that names a folder of data sets.
pub(super) const VARIABLE: &str = "DEPTHSHRINKER_DATA";

/// Where a data set may be, and what to tell who has none.
pub(super) struct Place {
    /// Name of the set.
    pub set: &'static str,
    /// Folders that it goes by inside a folder of data sets.
    pub folders: &'static [&'static str],
    /// Where a system package puts it.
    pub system: Option<&'static str>,
    /// The file that shows it is there.
    pub wanted: &'static str,
    /// How to get it.
    pub remedy: &'static str,
}

/// The first folder that `holds` the set: `dir`, when given, and nothing else, since falling back from a mistyped path
/// would train on other data than was asked for; otherwise what `variable` (the value of [`VARIABLE`]) names, then the
/// system's. The set's own folder goes before the folder that contains it: sets share file names.
pub(super) fn locate(
    place: &Place,
    dir: Option<&Path>,
    variable: Option<OsString>,
    holds: impl Fn(&Path) -> bool,
) -> Result<PathBuf> {
    let inside =
        |root: &Path| place.folders.iter().map(|folder| root.join(folder)).chain([root.to_owned()]).collect::<Vec<_>>();
    let variable = variable.filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut tried = Vec::new();
    if let Some(dir) = dir {
        tried = inside(dir);
    } else {
        tried.extend(variable.as_deref().map(inside).unwrap_or_default());
        tried.extend(place.system.map(PathBuf::from));
    }
    if let Some(folder) = tried.iter().find(|folder| holds(folder)) {
        tracing::debug!("{} from {}", place.set, folder.display());
        return Ok(folder.clone());
    }
    let looked = match tried.as_slice() {
        [] => "nowhere to look".to_owned(),
        tried => {
            let tried: Vec<String> = tried.iter().map(|folder| folder.display().to_string()).collect();
            format!("looked for {} in {}", place.wanted, tried.join(", "))
        }
    };
    let unset = if dir.is_none() && variable.is_none() { format!(" ({VARIABLE} is not set)") } else { String::new() };
    Err(Error::Data(format!("{} not found: {looked}{unset}; {}", place.set, place.remedy)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        set: "shoes",
        folders: &["shoes"],
        system: Some("/nonexistent/shoes"),
        wanted: "left-shoe",
        remedy: "buy some",
    };

    fn find(dir: Option<&Path>, variable: Option<&Path>) -> Result<PathBuf> {
        locate(&PLACE, dir, variable.map(|path| path.as_os_str().to_owned()), |folder| {
            folder.join("left-shoe").is_file()
        })
    }

    #[test]
    fn the_own_folder_goes_before_the_containing_one() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("left-shoe"), "").unwrap();
        assert_eq!(find(None, Some(root.path())).unwrap(), root.path());
        std::fs::create_dir(root.path().join("shoes")).unwrap();
        std::fs::write(root.path().join("shoes/left-shoe"), "").unwrap();
        assert_eq!(find(None, Some(root.path())).unwrap(), root.path().join("shoes"));
        assert_eq!(find(Some(root.path()), None).unwrap(), root.path().join("shoes"));
    }

    #[test]
    fn a_given_folder_without_the_set_is_an_error_even_if_the_set_is_elsewhere() {
        let (empty, full) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(full.path().join("left-shoe"), "").unwrap();
        let message = find(Some(empty.path()), Some(full.path())).unwrap_err().to_string();
        assert!(message.contains(&empty.path().display().to_string()) && !message.contains("nonexistent"), "{message}");
    }

    #[test]
    fn the_message_lists_where_it_looked_and_what_to_do() {
        let empty = tempfile::tempdir().unwrap();
        let message = find(None, Some(empty.path())).unwrap_err().to_string();
        for part in ["shoes not found", "left-shoe", "/nonexistent/shoes", "buy some", empty.path().to_str().unwrap()] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
        assert!(find(None, None).unwrap_err().to_string().contains("DEPTHSHRINKER_DATA is not set"));
    }
}
