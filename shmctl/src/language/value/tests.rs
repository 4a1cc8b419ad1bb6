use super::*;

#[test]
fn short_and_long_macs_are_equal() {
    let mac: MacAddr = "1:2:3:4:5:6".parse().unwrap();
    assert_eq!(mac, "01:02:03:04:05:06".parse().unwrap());
    assert_eq!(mac.to_string(), "01:02:03:04:05:06");
    for bad in [
        "",
        "1:2:3:4:5",
        "1:2:3:4:5:6:7",
        "001:2:3:4:5:6",
        "1:2:3:4:5:g",
        "+1:2:3:4:5:6",
        "1::3:4:5:6",
    ] {
        assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
    }
}

#[test]
fn masks_of_macs() {
    let mask: MacMask = "02:ff:00:01:02:03/ff:00:00:00:00:00".parse().unwrap();
    assert_eq!(mask.to_string(), "02:00:00:00:00:00/ff:00:00:00:00:00");
    assert!(mask.contains(MacAddr([2, 9, 9, 9, 9, 9])) && !mask.contains(MacAddr([4; 6])));
    assert_eq!(
        "2:0:0:0:0:1".parse::<MacMask>().map(|m| m.to_string()),
        Ok("02:00:00:00:00:01".to_string())
    );
    assert!("2:0:0:0:0:1/24".parse::<MacMask>().is_err());
}

#[test]
fn a_group_address_is_not_a_station() {
    assert!(MacAddr([2, 0, 0, 0, 0, 1]).is_station());
    assert!(!MacAddr([1, 0, 0x5e, 0, 0, 1]).is_station());
    assert!(!MacAddr([0; 6]).is_station());
}

#[test]
fn decimal_ethertypes_are_the_raw_field_of_a_little_endian_host() {
    for (text, number) in
        [("8", 0x0800), ("1544", 0x0806), ("56710", 0x86dd), ("0x88CC", 0x88cc), ("ARP", 0x0806)]
    {
        assert_eq!(text.parse(), Ok(EtherType::new(number).unwrap()), "{text}");
    }
    for bad in ["2048x", "5", "0x05ff", "0x", "0x10800", "65536", "-8", "0x+800", ""] {
        assert!(bad.parse::<EtherType>().is_err(), "{bad}");
    }
    // 2048 raw is 0x0008: a length, not a type; what was meant is 8 or 0x0800.
    assert!("2048".parse::<EtherType>().is_err());
}

#[test]
fn ranges_of_addresses_and_ports() {
    for (text, canonical) in [
        ("10.0.0.1", "10.0.0.1"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.0.0.0-10.255.255.255", "10.0.0.0/8"),
        ("10.0.0.1-10.0.0.9", "10.0.0.1-10.0.0.9"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("10.0.0.1/32", "10.0.0.1"),
        ("2001:db8::1/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("2001:db8::1-2001:db8::3", "2001:db8::1-2001:db8::3"),
    ] {
        let range: AddressRange = text.parse().unwrap();
        assert_eq!(range.to_string(), canonical);
        assert_eq!(canonical.parse(), Ok(range));
    }
    for bad in [
        "10.0.0.0/33",
        "::/129",
        "10.0.0.9-10.0.0.1",
        "10.0.0.1-::1",
        "10.0.0.1-",
        "/8",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
    ] {
        assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
    }
    let range: AddressRange = "10.0.0.0/8".parse().unwrap();
    let may = |ip: &str| range.contains(ip.parse().unwrap());
    assert!(
        may("10.0.0.0") && may("10.255.255.255") && !may("11.0.0.0") && !may("::ffff:10.0.0.1")
    );
    assert_eq!(
        "80-90".parse::<NumberRange>().map(|range| (range.contains(90), range.contains(91))),
        Ok((true, false))
    );
    assert!("90-80".parse::<NumberRange>().is_err() && "80-65536".parse::<NumberRange>().is_err());
}

#[test]
fn tcp_flags_and_fragments() {
    for (text, on, mask, canonical) in [
        ("syn", 2, 2, "syn"),
        ("ACK,SYN", 0x12, 0x12, "syn,ack"),
        ("syn/syn,ack", 2, 0x12, "syn/syn,ack"),
        ("none", 0, 255, "none"),
        ("none/rst,fin", 0, 5, "none/fin,rst"),
        ("all", 255, 255, "all"),
        ("fin/all", 1, 255, "fin/all"),
        ("syn/syn", 2, 2, "syn"),
    ] {
        let flags: TcpFlags = text.parse().unwrap();
        assert_eq!(
            (flags.on(), flags.mask(), flags.to_string().as_str()),
            (on, mask, canonical),
            "{text}"
        );
        assert_eq!(canonical.parse(), Ok(flags));
    }
    for bad in ["", "syn,", "sin", "ack/syn", "none/none", "syn/", "/syn", "2", "syn/ack/syn"] {
        assert!(bad.parse::<TcpFlags>().is_err(), "{bad}");
    }
    for (name, fragment) in FragmentMatch::ALL {
        assert_eq!((name.parse(), fragment.to_string().as_str()), (Ok(fragment), name));
    }
    assert!("any".parse::<FragmentMatch>().is_err());
    assert!(
        TcpFlags::new(2, 0x12).unwrap().contains(0xc2)
            && !TcpFlags::new(2, 0x12).unwrap().contains(0x12)
    );
}

#[test]
fn protocols_by_name_and_number() {
    assert_eq!("TCP".parse(), Ok(Protocol::TCP));
    assert_eq!("ipv6-icmp".parse::<Protocol>().map(|p| p.to_string()), Ok("icmp6".to_string()));
    assert_eq!("0x11".parse(), Ok(Protocol::UDP));
    assert_eq!("200".parse::<Protocol>().map(|p| p.to_string()), Ok("200".to_string()));
    assert!("256".parse::<Protocol>().is_err());
    assert!("0x+6".parse::<Protocol>().is_err());
}
