# Beside this file, in wssproxy/: wssproxy-0.1.tar.gz, which `make dist` of wssproxy makes.
SUMMARY = "Proxy for secure WebSockets that fits on a router"
SECTION = "net"
# BearSSL, which is linked in, is MIT.
LICENSE = "ISC & MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=e10657a2f3948eb24ad8a0ca0479522b \
                    file://../bearssl-0.6/LICENSE.txt;md5=1fc37e1037ae673975fbcb96a98f7191"

SRC_URI = "file://wssproxy-${PV}.tar.gz \
           https://bearssl.org/bearssl-0.6.tar.gz;name=bearssl"
SRC_URI[bearssl.sha256sum] = "6705bba1714961b41a728dfc5debbe348d2966c117649392f8c8139efc83ff14"

inherit systemd update-rc.d

SYSTEMD_SERVICE:${PN} = "wssproxy.service"
INITSCRIPT_NAME = "wssproxy"

# For a config.h of your own, made from wssproxy's config.def.h, in a .bbappend:
# FILESEXTRAPATHS:prepend := "${THISDIR}/files:"
# SRC_URI += "file://config.h"
# WSSPROXY_CONFIG = "${S}/../config.h"
# Without one it has the defaults, and logs to syslog.
WSSPROXY_CONFIG ?= ""

do_configure() {
	if [ -n "${WSSPROXY_CONFIG}" ]; then
		install -m 0644 "${WSSPROXY_CONFIG}" ${S}/config.h
	else
		sed 's/\(log_to  *= \)STDERR/\1SYSLOG/' ${S}/config.def.h >${S}/config.h
	fi
}

# compiler and flags come by the environment
do_compile() {
	oe_runmake BEARSSL=../bearssl-0.6
}

do_install() {
	oe_runmake install DESTDIR=${D} PREFIX=${prefix}
	install -d ${D}${sysconfdir}/wssproxy
	install -D -m 0755 ${S}/tests/pkg/buildroot/S50wssproxy ${D}${sysconfdir}/init.d/wssproxy
	install -D -m 0644 ${S}/tests/pkg/wssproxy.service ${D}${systemd_system_unitdir}/wssproxy.service
	sed -i 's,/usr/local/sbin,${sbindir},' ${D}${systemd_system_unitdir}/wssproxy.service
}

FILES:${PN} += "${systemd_system_unitdir}"
CONFFILES:${PN} = "${sysconfdir}/wssproxy"
