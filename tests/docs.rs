//! The documentation holds together: sections that comments cite exist, and relative links lead to files.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder` with one of the extensions.
fn files(folder: &Path, extensions: &[&str], into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            files(&path, extensions, into);
        } else if path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted)) {
            into.push(path);
        }
    }
}

/// The numbers or letters with which the headings of a page begin: `1.4` of `### 1.4 The merge`, `a` of `## (a) Rooflines`.
fn sections(page: &str) -> Vec<String> {
    let heading =
        |line: &str| Some(line.strip_prefix('#')?.trim_start_matches('#').split_whitespace().next()?.to_owned());
    let label = |word: String| word.trim_matches(['(', ')', '.']).to_owned();
    page.lines().filter_map(heading).map(label).collect()
}

/// The sections that a text cites of a page, as in `` `methods.md` 1.2 and 1.3 `` or `kernels.md a`.
fn citations(text: &str, page: &str) -> Vec<String> {
    let is_label = |word: &str| {
        let mut chars = word.chars();
        let number = word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        number || chars.next().is_some_and(|c| c.is_ascii_lowercase()) && chars.next().is_none()
    };
    let mut found = Vec::new();
    for (at, _) in text.match_indices(page) {
        let rest = text[at + page.len()..].lines().next().unwrap_or_default();
        let cited = rest.trim_start_matches('`').split([' ', ',', ';', ':', ')']).filter(|word| !word.is_empty());
        let label = |word: &str| word.trim_end_matches('.').to_owned();
        found.extend(cited.map(label).take_while(|word| is_label(word) || word == "and").filter(|word| word != "and"));
    }
    found
}

#[test]
fn every_section_that_is_cited_exists() {
    let mut sources = Vec::new();
    for folder in ["src", "kernels", "tests", "benches", "docs"] {
        files(&root().join(folder), &["rs", "cu", "cuh", "h", "md"], &mut sources);
    }
    let mut cited = 0;
    for page in ["methods.md", "kernels.md"] {
        let known = sections(&fs::read_to_string(root().join("docs").join(page)).expect("a page of docs/"));
        for source in sources.iter().filter(|path| !path.ends_with("tests/docs.rs")) {
            for section in citations(&fs::read_to_string(source).expect("UTF-8"), page) {
                assert!(known.contains(&section), "{} cites {page} {section}, which is not there", source.display());
                cited += 1;
            }
        }
    }
    assert!(cited > 10, "only {cited} citations found");
}

#[test]
fn relative_links_lead_to_files() {
    let single = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "fuzz/README.md"];
    let mut pages = single.map(|page| root().join(page)).to_vec();
    for folder in ["docs", "benches"] {
        files(&root().join(folder), &["md"], &mut pages);
    }
    let mut links = 0;
    for page in pages {
        let text = fs::read_to_string(&page).expect("a page");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let path = page.parent().expect("a page lies in a folder").join(file);
            assert!(path.exists(), "{} links to {target}, which is not there", page.display());
            links += 1;
        }
    }
    assert!(links > 5, "only {links} links found");
}

#[test]
fn citations_are_read_as_they_are_written() {
    assert_eq!(sections("# Title\n## (a) Rooflines\n### 1.4 The merge\ntext 1.5\n"), ["Title", "a", "1.4"]);
    assert_eq!(citations("(`methods.md` 1.3 and 1.4).", "methods.md"), ["1.3", "1.4"]);
    assert_eq!(citations("in the form of `methods.md` 1.3) is", "methods.md"), ["1.3"]);
    assert_eq!(citations("on load (`kernels.md` a, level C).", "kernels.md"), ["a"]);
    assert_eq!(citations("the map of `methods.md` 9.9: gone", "methods.md"), ["9.9"]);
    assert_eq!(citations("[methods.md](methods.md) | the method", "methods.md"), Vec::<String>::new());
}
