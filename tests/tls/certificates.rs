//! An authority, and what it signs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509NameBuilder};
use uuid::Uuid;

/// A folder of the test's own, gone with it.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tls-{}", Uuid::new_v4().simple()));
        fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    /// Writes a file that nobody else can read, and returns its path.
    pub fn write(&self, name: &str, content: &[u8]) -> String {
        let file = self.0.join(name);
        fs::write(&file, content).unwrap();
        set_mode(&file, 0o600);
        file.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

pub fn set_mode(file: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

/// A certificate with its key.
pub struct Signed {
    certificate: X509,
    key: PKey<Private>,
}

impl Signed {
    pub fn certificate(&self) -> Vec<u8> {
        self.certificate.to_pem().unwrap()
    }

    pub fn key(&self) -> Vec<u8> {
        self.key.private_key_to_pem_pkcs8().unwrap()
    }

    pub fn locked_key(&self, password: &str) -> Vec<u8> {
        self.key.private_key_to_pem_pkcs8_passphrase(openssl::symm::Cipher::aes_256_cbc(), password.as_bytes()).unwrap()
    }

    /// One that signs others, and is signed by itself.
    pub fn authority(name: &str) -> Signed {
        sign(name, &[], None, 1)
    }

    /// One for a host or a role, of this name.
    pub fn sign(&self, name: &str) -> Signed {
        sign(name, &[name], Some(self), 1)
    }

    pub fn sign_expired(&self, name: &str) -> Signed {
        sign(name, &[name], Some(self), -1)
    }

    /// One for a host that is signed by itself.
    pub fn by_itself(name: &str) -> Signed {
        sign(name, &[name], None, 1)
    }
}

fn sign(name: &str, hosts: &[&str], by: Option<&Signed>, days: i64) -> Signed {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let subject = subject.build();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    let serial = BigNum::from_slice(&Uuid::new_v4().as_bytes()[..8]).unwrap().to_asn1_integer().unwrap();
    builder.set_serial_number(&serial).unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder.set_issuer_name(by.map_or(&*subject, |by| by.certificate.subject_name())).unwrap();
    builder.set_pubkey(&key).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let at = |days: i64| Asn1Time::from_unix(now + days * 24 * 60 * 60).unwrap();
    builder.set_not_before(&at(-2)).unwrap();
    builder.set_not_after(&at(days)).unwrap();
    if hosts.is_empty() {
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
    } else {
        let mut names = SubjectAlternativeName::new();
        hosts.iter().for_each(|host| _ = names.dns(host));
        let names = names.build(&builder.x509v3_context(by.map(|by| &*by.certificate), None)).unwrap();
        builder.append_extension(names).unwrap();
    }
    builder.sign(by.map_or(&key, |by| &by.key), MessageDigest::sha256()).unwrap();
    Signed { certificate: builder.build(), key }
}
